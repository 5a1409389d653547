"""Dispatch, experts and combine in one: what the hot path runs."""

import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients, dense_gates
from tests.oracles import mixture as oracle

N, D, E, K, H = 9, 5, 6, 2, 4


@pytest.fixture
def case(rng):
    # The last expert has no rows.
    indices = np.stack([rng.permutation(E - 1)[:K] for _ in range(N)]).astype("int32")
    return {
        "x": rng.normal(size=(N, D)),
        "gates": rng.uniform(0.1, 1.0, size=(N, K)),
        "indices": indices,
        "kernels": [rng.normal(size=(E, D, H)), rng.normal(size=(E, H, D + 1))],
        "biases": [rng.normal(size=(E, H)), rng.normal(size=(E, D + 1))],
    }


def plan_of(kind, indices):
    if kind == "dropless":
        return F.make_dispatch_plan(indices, E)
    if kind == "ragged":
        tokens = np.repeat(np.arange(len(indices)), indices.shape[1])
        return F.make_dispatch_plan(indices.reshape(-1), E, tokens)
    return F.make_capacity_plan(indices, E, 2 * len(indices))


@pytest.fixture(params=["blocks", "unrolled", "chosen"])
def way(request):
    """All ways to run experts, whatever their number."""
    return {"computation": request.param}


@pytest.mark.parametrize("kind", ["dropless", "ragged", "capacity"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_it_equals_the_oracle(way, case, kind, recompute):
    plan = plan_of(kind, case["indices"])

    def mix(x, gates, *weights):
        gates = tf.reshape(gates, [-1]) if kind == "ragged" else gates
        kernels, biases = weights[:2], weights[2:]
        return F.mix_feed_forward_experts(
            x, gates, plan, kernels, biases, tf.nn.tanh, recompute, **way
        )

    def expected(x, gates, *weights):
        dense = dense_gates(gates, case["indices"], E)
        return oracle.mixture(x, dense, weights[:2], weights[2:], np.tanh)

    arrays = [case["x"], case["gates"], *case["kernels"], *case["biases"]]
    assert_value_and_gradients(mix, expected, arrays)


def test_without_biases_relu_is_the_activation(way, case):
    plan = plan_of("dropless", case["indices"])
    assert_value_and_gradients(
        lambda x, g, *w: F.mix_feed_forward_experts(x, g, plan, w, **way),
        lambda x, g, *w: oracle.mixture(x, dense_gates(g, case["indices"], E), w),
        [case["x"], case["gates"], *case["kernels"]],
    )


@pytest.mark.parametrize("num_experts", [1, E])
def test_an_empty_batch(way, case, num_experts):
    kernels = [tf.constant(w[:num_experts]) for w in case["kernels"]]
    gates = tf.zeros((0, 1), tf.float64)
    plan = F.make_dispatch_plan(np.zeros((0, 1), "int32"), num_experts)
    with tf.GradientTape() as tape:
        tape.watch(kernels)
        y = F.mix_feed_forward_experts(
            tf.zeros((0, D), tf.float64), gates, plan, kernels, **way
        )
    assert y.shape == (0, D + 1)
    for gradient in tape.gradient(y, kernels, unconnected_gradients="zero"):
        assert not np.any(tf.convert_to_tensor(gradient))


def test_one_graph_serves_any_number_of_tokens_and_any_skew(way, case, rng):
    kernels = [tf.constant(w, tf.float32) for w in case["kernels"]]

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, D)),
            tf.TensorSpec((None, K)),
            tf.TensorSpec((None, K), tf.int32),
        ]
    )
    def mix(x, gates, indices):
        plan = F.make_dispatch_plan(indices, E)
        return F.mix_feed_forward_experts(x, gates, plan, kernels, **way)

    for n, most in ((0, E), (1, E), (7, K), (64, K), (64, E)):
        x = rng.normal(size=(n, D)).astype("float32")
        gates = rng.uniform(size=(n, K)).astype("float32")
        indices = np.array([rng.permutation(most)[:K] for _ in range(n)], "int32")
        indices = indices.reshape(n, K)
        dense = dense_gates(gates, indices, E)
        wanted = (
            oracle.mixture(x, dense, case["kernels"]) if n else np.zeros((0, D + 1))
        )
        np.testing.assert_allclose(mix(x, gates, indices), wanted, atol=1e-4)


def test_second_derivatives(way, case):
    """Of a gradient penalty: what replaces stock operations has gradients too."""
    plan = plan_of("dropless", case["indices"])
    arrays = [case["x"], case["gates"], *case["kernels"]]

    def penalty(mix, *tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            y = tf.reduce_sum(tf.square(mix(*tensors)))
        found = map(tf.convert_to_tensor, tape.gradient(y, tensors))
        return sum(tf.reduce_sum(g**2) for g in found)

    def loops(x, gates, *kernels):
        rows = []
        for n, experts in enumerate(case["indices"]):
            own = [
                gates[n, j]
                * tf.linalg.matvec(
                    kernels[1][e],
                    tf.nn.tanh(tf.linalg.matvec(kernels[0][e], x[n], transpose_a=True)),
                    transpose_a=True,
                )
                for j, e in enumerate(experts)
            ]
            rows.append(sum(own))
        return tf.stack(rows)

    def in_one(x, gates, *kernels):
        return F.mix_feed_forward_experts(
            x, gates, plan, kernels, None, tf.nn.tanh, **way
        )

    gradients = []
    for mix in (in_one, loops):
        tensors = [tf.constant(array) for array in arrays]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total = penalty(mix, *tensors)
        gradients.append(tape.gradient(total, tensors))
    for gradient, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(
            tf.convert_to_tensor(gradient), tf.convert_to_tensor(wanted), rtol=1e-9
        )
