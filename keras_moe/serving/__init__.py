"""Export for TensorFlow Serving."""

from keras_moe.serving.export import export

__all__ = ["export"]
