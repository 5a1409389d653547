import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional
from tests.helpers import assert_value_and_gradients
from tests.oracles import attention as oracle
from tests.oracles import transformer


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


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_heads_that_share_keys_equal_the_loops(rng, groups):
    query = rng.normal(size=(2, 3, 4, 2))
    keys, values = (
        rng.normal(size=(2, 5, groups, 2)),
        rng.normal(size=(2, 5, groups, 3)),
    )
    mask = rng.random((2, 3, 5)) < 0.6
    mask[1, 2] = False  # attends to nothing
    assert_value_and_gradients(
        lambda *arrays: functional.dot_product_attention(*arrays, mask),
        lambda *arrays: transformer.attention(*arrays, mask),
        [query, keys, values],
    )


def test_rotary_positions_equal_complex_numbers(rng):
    x = rng.normal(size=(2, 3, 2, 6))
    positions = np.array([[0, 1, 2], [7, 100, 5000]])
    assert_value_and_gradients(
        lambda x: functional.rotary_embedding(x, positions, 50.0),
        lambda x: transformer.rotary(x, positions, 50.0),
        [x],
    )


def test_products_of_rotated_vectors_depend_on_the_distance(rng):
    query, key = rng.normal(size=(2, 1, 1, 1, 8))

    def product(m, n):
        turned = [
            functional.rotary_embedding(x, [[at]]) for x, at in ((query, m), (key, n))
        ]
        return float(tf.reduce_sum(turned[0] * turned[1]))

    np.testing.assert_allclose(product(9, 4), product(1005, 1000), rtol=1e-9)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_errors_of_attention_with_heads():
    x = np.ones((1, 2, 3, 5))
    with pytest.raises(ValueError, match=r"even.*5\)"):
        functional.rotary_embedding(x, [[0, 1]])
    with pytest.raises(ValueError, match="multiple of the heads"):
        functional.dot_product_attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(ValueError, match="`mask` must be of bools"):
        functional.dot_product_attention(x, x, x, np.ones((1, 2, 2)))
    with pytest.raises(ValueError, match=r"`mask` must broadcast to \(1, 2, 2\)"):
        functional.dot_product_attention(x, x, x, np.ones((1, 2, 3), bool))
