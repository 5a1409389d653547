"""Export for TensorFlow Serving."""

from keras_moe.serving.saved_model import export
from keras_moe.serving.text import TextCodec

__all__ = ["TextCodec", "export"]
