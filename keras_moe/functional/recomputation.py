"""Networks of which only the arguments are kept for the backward pass (appendix D)."""

from collections.abc import Callable, Sequence

import tensorflow as tf

Network = Callable[..., tf.Tensor]


def recomputed(function: Network) -> Network:
    """`function`, of which only the arguments are kept for the backward pass.

    `tf.recompute_grad` would add a zero to every argument, so it would copy all
    the weights; here only the inputs depend on the incoming gradient.
    """

    @tf.custom_gradient
    def run(x, *weights):
        def grad(dy):
            # The dependency keeps the graph optimizer from taking the values of
            # the forward pass, which would have to be kept for it.
            with tf.control_dependencies([dy]):
                inputs = tf.identity(x)
            return gradients_of(function, inputs, weights, dy)

        return function(x, *weights), grad

    return run


def gradients_of(
    function: Network,
    rows: tf.Tensor,
    weights: Sequence[tf.Tensor],
    upstream: tf.Tensor,
) -> list:
    """Runs a network again, for its gradients.

    Args:
        function: The network.
        rows: Its rows.
        weights: Its weights.
        upstream: The gradient of its outputs.

    Returns:
        The gradient of the rows, and for each weight its gradient, or None if it has
        none: a weight of whole numbers, or one that is not trained.
    """
    with tf.GradientTape() as tape:
        watch(tape, rows, weights)
        outputs = function(rows, *weights)
    return gradients_on(tape, outputs, rows, weights, upstream)


def watch(tape: tf.GradientTape, rows: tf.Tensor, weights: Sequence[tf.Tensor]) -> None:
    """Watches what has a gradient."""
    tape.watch([rows, *(weight for weight in weights if weight.dtype.is_floating)])


def gradients_on(
    tape: tf.GradientTape,
    outputs: tf.Tensor,
    rows: tf.Tensor,
    weights: Sequence[tf.Tensor],
    upstream: tf.Tensor,
) -> list:
    """As `gradients_of`, of what a tape has recorded after `watch`."""
    floats = [weight for weight in weights if weight.dtype.is_floating]
    d_rows, *found = tape.gradient(outputs, [rows, *floats], upstream)
    each = iter(found)
    d_weights = [next(each) if w.dtype.is_floating else None for w in weights]
    return [tf.zeros_like(rows) if d_rows is None else d_rows, *d_weights]


def float_type(rows: tf.Tensor, weights: Sequence[tf.Tensor]) -> tf.DType:
    """The type in which experts compute: that of their first weight of floats."""
    return next((w.dtype for w in weights if w.dtype.is_floating), rows.dtype)
