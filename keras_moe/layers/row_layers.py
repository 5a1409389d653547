"""Any Keras layer, called on rows of tokens."""

import inspect
from typing import Any

import keras
import tensorflow as tf


def verify_takes_rows(layer: Any, features: int, argument: str) -> tuple:
    """Builds a layer, and returns the shape of its outputs.

    Args:
        layer: The Keras layer.
        features: Of its inputs `(tokens, features)`.
        argument: Name of the argument that it is, for the message.

    Raises:
        ValueError: It does not take rows.
    """
    try:
        spec = keras.KerasTensor((None, features), layer.compute_dtype)
        if not layer.built:
            layer.build(spec.shape)
        outputs = layer.compute_output_spec(spec)
    except Exception as error:
        raise ValueError(
            f"`{argument}` must take rows (tokens, features): `MoE` takes all leading "
            f"axes of its inputs for tokens. Received: {layer!r}, which does not take "
            f"({features} features): {error} For experts over whole images or "
            "sequences flatten each example to one row before `MoE`, and begin every "
            "expert with `Reshape`, e.g. keras.Sequential([keras.layers.Reshape("
            "(height, width, channels)), keras.layers.Conv2D(...), "
            "keras.layers.Flatten()])."
        ) from error
    return tuple(outputs.shape)


def run_rows(
    layer: Any, rows: tf.Tensor, mask: tf.Tensor | None, training: bool | None
) -> tf.Tensor:
    """Calls a layer on rows, with `mask` and `training` if it takes them.

    Args:
        layer: The Keras layer.
        rows: `(..., features)`.
        mask: `(...)` bool or None. False where a row is not real.
        training: Whether the call trains.
    """
    taken = inspect.signature(layer.call).parameters
    options: dict[str, Any] = {}
    if "training" in taken:
        options["training"] = training
    # Keras would lose it in a model that does not support masks.
    reaches = not isinstance(layer, keras.Model) or _reaches_parts(layer)
    if "mask" in taken and mask is not None and reaches:
        options["mask"] = mask
    return layer(rows, **options)


def run_any_rows(layer: Any, rows: tf.Tensor, training: bool | None) -> tf.Tensor:
    """The same for rows of which there may be none.

    Many layers fail on an empty batch: they get one row of zeros, whose answer is
    thrown away, and are told by a mask that it is not real.
    """
    number = tf.shape(rows)[0]
    # In whole numbers alone, which the host has: a GPU would cast a bool.
    missing = 1 - tf.minimum(number, 1)
    padded = tf.pad(rows, [[0, missing], [0, 0]])
    real = tf.range(tf.shape(padded)[0]) < number
    return run_rows(layer, padded, real, training)[:number]


def _reaches_parts(layer):
    """Whether a mask reaches every layer inside of a model, which is told so.

    A Sequential does not say by itself that its layers support masks.
    """
    parts = [each for each in layer.layers if isinstance(each, keras.layers.Layer)]
    for each in parts:
        if isinstance(each, keras.Model):
            _reaches_parts(each)
    layer.supports_masking = layer.supports_masking or all(
        each.supports_masking or isinstance(each, keras.layers.InputLayer)
        for each in parts
    )
    return layer.supports_masking
