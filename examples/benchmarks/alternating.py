"""Timing of two sides that alternate in one run.

The ratio of a pair holds even where the speed of the machine changes.
"""

import time

import keras
import numpy as np
import tensorflow as tf

# Every side is a function of its own: TensorFlow would take that for retracing.
tf.get_logger().setLevel("ERROR")


def seconds(function, *arguments):
    """Time of one call, until its result is there."""
    start = time.perf_counter()
    tf.nest.map_structure(lambda result: np.ravel(result)[:1], function(*arguments))
    return time.perf_counter() - start


def compare(first, second, arguments, pairs):
    """Times `first` and `second` alternately, after one call of each to trace them.

    Returns:
        Median seconds of each, and the quartiles of `first / second`, pair by pair.
    """
    for side in (first, second):
        side(*arguments)
    times = np.array(
        [
            (seconds(first, *arguments), seconds(second, *arguments))
            for _ in range(pairs)
        ]
    )
    return np.median(times, axis=0), np.percentile(
        times[:, 0] / times[:, 1], [25, 50, 75]
    )


def make_steps(call, variables, optimizer=None):
    """`forward(x)`, `training(x)`: one number made of the outputs or of all gradients.

    Reduced to one number, so that nothing is copied out and nothing is left out.

    Args:
        call: `(x, training)` -> outputs and list of losses.
        variables: Of the gradients; with an optimizer Keras' variables.
        optimizer: A Keras optimizer or None. With one there is `update(x)` too: a
            training step and the optimizer's. Defaults to `None`.
    """

    values = [v.value if isinstance(v, keras.Variable) else v for v in variables]

    @tf.function
    def forward(x):
        return tf.reduce_sum(call(x, False)[0])

    def gradients_of(x):
        with tf.GradientTape() as tape:
            outputs, losses = call(x, True)
            total = tf.reduce_mean(tf.square(outputs)) + sum(losses)
        return tape.gradient(total, values)

    @tf.function
    def training(x):
        # Done when every gradient is: one element of each is read.
        return tf.add_n([tf.reshape(g, [-1])[0] for g in gradients_of(x)])

    @tf.function
    def update(x):
        optimizer.apply_gradients(zip(gradients_of(x), variables, strict=True))
        # A call ends with all of its writes. Reading a variable here may copy it.
        return tf.identity(optimizer.iterations)

    steps = {"forward": forward, "training": training}
    if optimizer is not None:
        optimizer.build(variables)
        steps["update"] = update
    return steps
