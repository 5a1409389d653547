"""What the experts do: metrics and scores."""

from keras_moe.telemetry.information import (
    LabelInformation,
    label_information,
    mutual_information,
)
from keras_moe.telemetry.metrics import Perplexity
from keras_moe.telemetry.translation import translation_scores

__all__ = [
    "LabelInformation",
    "Perplexity",
    "label_information",
    "mutual_information",
    "translation_scores",
]
