"""The largest arrays of a step are corrected where they lie, and not copied for it."""

import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional
from keras_moe.functional import ops

RNG = np.random.default_rng(0)


def floats(*shape):
    return tf.constant(RNG.normal(size=shape), tf.float32)


def sampled(inputs, kernel):
    targets, candidates = tf.constant([0, 1, 2, 3]), tf.constant([1, 3, 5], tf.int64)
    bias = tf.zeros(kernel.shape[0])
    return functional.sampled_cross_entropy(
        inputs, kernel, bias, targets, candidates, tf.ones(3)
    )


def full(inputs, kernel):
    logits = tf.matmul(inputs, kernel, transpose_b=True)
    return functional.cross_entropy(logits, tf.constant([0, 1, 2, 3]))


def in_blocks(inputs, kernel):
    plan = functional.make_dispatch_plan(tf.constant([[0], [0], [0], [2]]), 3)
    return functional.mix_experts(
        tf.matmul,
        inputs,
        tf.ones((4, 1)),
        plan,
        [tf.reshape(kernel, (3, 2, 5))],
        computation="blocks",
    )


@pytest.mark.parametrize(
    ("function", "shape"), [(sampled, (6, 2)), (full, (6, 2)), (in_blocks, (30, 1))]
)
def test_nothing_large_is_copied_to_be_corrected(function, shape):
    """`TensorScatter...` copies what it changes on CPUs, even if nobody else reads it."""

    @tf.function
    def step(inputs, kernel):
        with tf.GradientTape() as tape:
            tape.watch([inputs, kernel])
            loss = tf.reduce_sum(function(inputs, kernel))
        return tape.gradient(loss, [inputs, kernel])

    graph = step.get_concrete_function(floats(4, 2), floats(*shape)).graph
    kinds = [op.type for op in graph.get_operations()]
    assert not [kind for kind in kinds if kind.startswith("TensorScatter")]
    assert "ScatterNdNonAliasingAdd" in kinds


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_add_at(dtype):
    """What others read is left as it is, and every value has its gradient."""
    total = tf.cast(floats(3, 4), dtype)
    before, values = total.numpy().copy(), tf.cast([1.0, -2.0], dtype)
    cells = tf.constant([[0, 1], [2, 3]])
    with tf.GradientTape() as tape:
        tape.watch([total, values])
        found = ops.add_at(total, cells, values)
        loss = tf.reduce_sum(found * found)
    expected = before.copy()
    expected[[0, 2], [1, 3]] += values.numpy()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(total, before)
    d_total, d_values = tape.gradient(loss, [total, values])
    np.testing.assert_array_equal(d_total, 2 * expected)
    np.testing.assert_array_equal(d_values, 2 * expected[[0, 2], [1, 3]])
