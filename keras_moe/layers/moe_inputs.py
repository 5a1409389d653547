"""What a mixture is given: masks, and what its gate sees."""

from typing import Any

import tensorflow as tf

from keras_moe import checks


def verify_gate_inputs(layer: Any, gate_inputs: Any, inputs: tf.Tensor) -> None:
    """Raises unless the gate of a mixture can take what it is given.

    Args:
        layer: Has `gate_features`, for which its gate was built.
        gate_inputs: Those of the call, or None: the gate sees the inputs.
        inputs: Those of the experts.
    """
    layer_name = type(layer).__name__
    name = f"`gate_inputs` of {layer_name}"
    if gate_inputs is None:
        features = inputs.shape[-1]
    else:
        checks.verify_dense(gate_inputs, layer_name, "gate_inputs")
        checks.verify_floating(gate_inputs.dtype, layer_name, "gate_inputs")
        leading, features = gate_inputs.shape[:-1], gate_inputs.shape[-1]
        if not leading.is_compatible_with(inputs.shape[:-1]):
            raise ValueError(
                f"{name} must have the leading dimensions of `inputs`. Received: "
                f"gate_inputs.shape={gate_inputs.shape}, inputs.shape={inputs.shape}. "
                "Give every token its own."
            )
    if features != layer.gate_features:
        raise ValueError(
            f"{name} must be as wide as what its gate was built for. Received: "
            f"{features} features, gate built for {layer.gate_features}. Call the "
            "layer with `gate_inputs` always or never."
        )


def flatten_mask(mask: Any, inputs: tf.Tensor) -> tf.Tensor:
    """`(...)` or a prefix of it -> `(N,)` bool, for inputs `(..., features)`."""
    mask = tf.cast(mask, tf.bool)
    missing = inputs.shape.rank - 1 - mask.shape.rank
    if missing < 0 or not mask.shape.is_compatible_with(
        inputs.shape[: mask.shape.rank]
    ):
        raise ValueError(
            "`mask` must have the leading dimensions of `inputs`. Received: "
            f"mask.shape={mask.shape}, inputs.shape={inputs.shape}."
        )
    for _ in range(missing):
        mask = mask[..., tf.newaxis]
    return tf.reshape(tf.broadcast_to(mask, tf.shape(inputs)[:-1]), [-1])
