"""Export for TensorFlow Serving and TensorFlow Lite."""

from keras_moe.runtime import compiled_mixtures, gpu_operations, plain_operations
from keras_moe.serving.saved_model import export
from keras_moe.serving.text import TextCodec
from keras_moe.serving.tflite import export_tflite

__all__ = [
    "TextCodec",
    "compiled_mixtures",
    "export",
    "export_tflite",
    "gpu_operations",
    "plain_operations",
]
