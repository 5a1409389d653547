"""Export for TensorFlow Serving and TensorFlow Lite."""

from keras_moe.functional.plain import plain_operations
from keras_moe.serving.saved_model import export
from keras_moe.serving.text import TextCodec
from keras_moe.serving.tflite import export_tflite

__all__ = ["TextCodec", "export", "export_tflite", "plain_operations"]
