"""Files for TensorFlow Lite (LiteRT)."""

import os
import tempfile
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_moe import writing
from keras_moe.runtime import plain_operations
from keras_moe.serving.saved_model import export


def export_tflite(
    model: keras.Model, file: str | os.PathLike, *, input_signature: Any = None
) -> Path:
    """Writes a model as a file for TensorFlow Lite, with its built-in operations.

    The file has the signature `serving_default` of `keras_moe.serving.export`. The
    batch is free, and nothing is dropped where the model has no capacity. For options
    of the converter (quantization, say) give it what `export` writes within
    `keras_moe.serving.plain_operations`.

    Args:
        model: As in `export`, without strings.
        file: Path of the new file, which is replaced if it exists.
        input_signature: As in `export`. Defaults to `None`.

    Returns:
        Path of the file.

    Raises:
        ValueError: As `export`, or the model has operations that TensorFlow Lite
            has not.
    """
    file = Path(file)
    name = "serving_default"
    with tempfile.TemporaryDirectory() as directory:
        with plain_operations():
            path = export(
                model, directory, signatures=[name], input_signature=input_signature
            )
        converter = tf.lite.TFLiteConverter.from_saved_model(
            str(path), signature_keys=[name]
        )
        try:
            content = converter.convert()
        except Exception as error:  # the converter's own type is private
            raise ValueError(
                "`model` must consist of operations that TensorFlow Lite has. Received: "
                f"{model.name!r}, which does not convert: {error} Leave these operations "
                "to the program around it, or serve the SavedModel of `export`."
            ) from error
    with writing.written_beside(file) as partial:
        partial.write_bytes(content)
    return file
