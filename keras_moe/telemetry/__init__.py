"""What the experts do: metrics and scores."""

from keras_moe.telemetry.metrics import Perplexity
from keras_moe.telemetry.translation import mutual_information, translation_scores

__all__ = ["Perplexity", "mutual_information", "translation_scores"]
