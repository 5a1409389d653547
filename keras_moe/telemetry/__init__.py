"""What the experts do: metrics."""

from keras_moe.telemetry.metrics import Perplexity

__all__ = ["Perplexity"]
