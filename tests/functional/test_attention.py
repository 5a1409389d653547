import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional
from tests.helpers import assert_value_and_gradients
from tests.oracles import attention as oracle


def arrays(rng, units=3):
    query, memory = rng.normal(size=(2, 2, 4)), rng.normal(size=(2, 3, 5))
    kernels = rng.normal(size=(5, units)), rng.normal(size=(4, units))
    return [query, memory, *kernels, rng.normal(size=units)]


def test_scores_equal_the_loops(rng):
    def scores(query, memory, key_kernel, query_kernel, scale):
        keys = functional.attention_keys(memory, key_kernel, scale)
        return functional.attention_scores(query, keys, query_kernel)

    assert_value_and_gradients(scores, oracle.scores, arrays(rng))


def test_attention_equals_the_loops_whatever_is_masked(rng):
    mask = np.array([[True, True, False], [True, False, True]])

    def attention(query, memory, key_kernel, query_kernel, scale):
        keys = functional.attention_keys(memory, key_kernel, scale)
        scores = functional.attention_scores(query, keys, query_kernel)
        return tf.matmul(functional.masked_softmax(scores, mask[:, None]), memory)

    assert_value_and_gradients(
        attention, lambda *inputs: oracle.attention(*inputs, mask), arrays(rng)
    )


def test_the_softmax_of_nothing_is_zero_with_zero_gradient():
    scores = tf.constant([[1.0, 2.0], [3.0, 4.0]])
    mask = tf.constant([[False, False], [True, True]])
    with tf.GradientTape() as tape:
        tape.watch(scores)
        weights = functional.masked_softmax(scores, mask)
        loss = tf.reduce_sum(weights * [[1.0, 2.0], [1.0, 2.0]])
    np.testing.assert_array_equal(weights[0], [0.0, 0.0])
    np.testing.assert_allclose(weights[1], tf.nn.softmax([3.0, 4.0]), rtol=1e-6)
    gradient = tape.gradient(loss, scores).numpy()
    np.testing.assert_array_equal(gradient[0], [0.0, 0.0])
    assert np.abs(gradient[1]).min() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_huge_scores_do_not_overflow_and_masked_ones_do_not_matter(dtype):
    # The masked score is the largest: subtracting it would underflow all others.
    scores = tf.constant([[60000.0, 300.0, 299.0]], dtype)
    weights = functional.masked_softmax(scores, tf.constant([[False, True, True]]))
    expected = [0.0, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]
    np.testing.assert_allclose(weights[0], expected, rtol=2e-3)
