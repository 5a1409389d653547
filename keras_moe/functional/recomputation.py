"""Networks of which only the arguments are kept for the backward pass (appendix D)."""

from collections.abc import Callable

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
            with tf.GradientTape() as tape:
                tape.watch([inputs, *weights])
                outputs = function(inputs, *weights)
            return tape.gradient(
                outputs, [inputs, *weights], dy, unconnected_gradients="zero"
            )

        return function(x, *weights), grad

    return run
