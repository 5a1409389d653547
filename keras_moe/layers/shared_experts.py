"""Experts that every token passes, beside those that a gate chooses."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe.layers.row_layers import run_any_rows, run_rows, verify_takes_rows


def verify_shared(shared: Any) -> None:
    """Raises a `ValueError` unless it is a layer or None."""
    if shared is not None and not isinstance(shared, keras.layers.Layer):
        raise ValueError(
            "`shared_experts` must be a Keras layer or None. Received: "
            f"shared_experts={shared!r}. Put several layers into a keras.Sequential, "
            "or make one as many times as wide."
        )


def build_shared(shared: Any, features: int, output_units: int) -> None:
    """Builds the layer, if there is one.

    Raises:
        ValueError: It does not map `(tokens, features)` to `(tokens, output_units)`.
    """
    if shared is None:
        return
    shape = verify_takes_rows(shared, features, "shared_experts")
    if shape != (None, output_units):
        raise ValueError(
            "`shared_experts` must map (tokens, features) to (tokens, output_units) of "
            f"`experts`. Received: outputs {shape} for features={features}, "
            f"output_units={output_units}. Give both one width."
        )


def add_shared(
    shared: Any,
    outputs: tf.Tensor,
    tokens: tf.Tensor,
    mask: tf.Tensor | None,
    training: bool | None,
    static_shapes: bool,
) -> tf.Tensor:
    """The outputs of a mixture, and what the shared experts say, if there are any.

    Args:
        shared: The layer, or None.
        outputs: `(N, output_units)`.
        tokens: `(N, features)`.
        mask: `(N,)` bool or None. Tokens marked False get nothing.
        training: Whether the call trains.
        static_shapes: Whether shapes must not depend on the data.
    """
    if shared is None:
        return outputs
    if static_shapes:
        answers = run_rows(shared, tokens, mask, training)
    else:
        answers = run_any_rows(shared, tokens, training)
    if mask is not None:
        answers = tf.where(mask[:, tf.newaxis], answers, tf.zeros_like(answers))
    return outputs + tf.cast(answers, outputs.dtype)
