"""Comparisons between TensorFlow functions and oracles."""

import numpy as np
import tensorflow as tf

from tests.oracles import mixture as oracle


def assert_value_and_gradients(function, oracle_function, arrays, rtol=1e-6):
    """A TensorFlow function equals its oracle in value and every gradient.

    Both take the arrays and return an array. Gradients are those of a fixed
    random weighting of the result, so that no element goes unnoticed.
    """
    expected = np.asarray(oracle_function(*arrays))
    weights = np.random.default_rng(0).normal(size=expected.shape)

    def scalar(*inputs):
        return float(np.sum(weights * oracle_function(*inputs)))

    tensors = [tf.constant(array, tf.float64) for array in arrays]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        result = function(*tensors)
        total = tf.reduce_sum(result * weights)
    np.testing.assert_allclose(result.numpy(), expected, rtol=rtol, atol=1e-9)
    gradients = tape.gradient(total, tensors)
    expected_gradients = oracle.numerical_gradients(scalar, arrays)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient is not None
        np.testing.assert_allclose(
            tf.convert_to_tensor(gradient).numpy(), wanted, rtol=1e-4, atol=1e-6
        )


def dense_gates(gates, expert_indices, num_experts):
    """`(N, K)` gates and experts as the `(N, E)` matrix of the paper."""
    dense = np.zeros((len(gates), num_experts))
    for row, g, e in zip(
        dense, np.asarray(gates), np.asarray(expert_indices), strict=True
    ):
        row[e] += g
    return dense
