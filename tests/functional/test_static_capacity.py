"""A capacity for XLA and GPUs: the same plan, values and gradients as elsewhere."""

import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe.functional import sorting
from keras_moe.serving import gpu_operations
from tests.helpers import assert_value_and_gradients, dense_gates
from tests.oracles import mixture as oracle

N, D, E, K, H = 11, 3, 4, 2, 5


@pytest.fixture
def indices(rng):
    """Skewed to the first experts; two tokens have fewer experts than K."""
    found = np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype("int32")
    found[:5] = [0, 1]
    found[6], found[7, 1] = -1, -1
    return found


def compiled(function, way):
    if way == "eager":
        return function
    return tf.function(function, jit_compile=way == "xla", autograph=False)


@pytest.mark.parametrize("path", ["counted", "sorted"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("capacity", "limit"), [(1, None), (4, None), (4, 2), (99, 9)])
def test_the_plan_is_the_same(monkeypatch, rng, indices, path, masked, capacity, limit):
    if path == "sorted":
        monkeypatch.setattr(sorting, "_MOST_COUNTED", 0)
    mask = rng.random(N) < 0.7 if masked else None
    expected = F.make_capacity_plan(indices, E, capacity, mask, limit)
    with gpu_operations():
        found = F.make_capacity_plan(indices, E, capacity, mask, limit)
    for name, wanted in expected._asdict().items():
        ours = getattr(found, name)
        assert ours.dtype == wanted.dtype
        np.testing.assert_array_equal(ours, wanted, err_msg=name)
    assert int(found.overflow) == int(expected.overflow)


@pytest.mark.parametrize(
    "way", ["eager", "graph", pytest.param("xla", marks=pytest.mark.slow)]
)
def test_values_and_gradients_equal_the_oracle(way, rng, indices):
    gates = rng.uniform(0.1, 1.0, size=(N, K))
    arrays = [rng.normal(size=(N, D)), gates]
    arrays += [rng.normal(size=(E, D, H)), rng.normal(size=(E, H, D))]
    # By hand: first choices before second ones, earlier tokens before later ones.
    free, kept = np.full(E, 3), np.zeros((N, K))
    for k in range(K):
        for n in range(N):
            expert = indices[n, k]
            if expert >= 0 and free[expert]:
                free[expert] -= 1
                kept[n, k] = 1.0
    assert 0 < kept.sum() < np.sum(indices >= 0)

    def run(x, gates, *kernels):
        with gpu_operations():
            plan = F.make_capacity_plan(indices, E, 3)
            network = F.feed_forward_network(2, tf.nn.relu)
            return F.mix_experts(network, x, gates, plan, kernels)

    assert_value_and_gradients(
        compiled(run, way),
        lambda x, g, *w: oracle.mixture(
            x, dense_gates(g * kept, np.maximum(indices, 0), E), w
        ),
        arrays,
    )


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_no_tokens_have_no_slots(way):
    def run(indices):
        with gpu_operations():
            plan = F.make_capacity_plan(indices, E, 2)
            rows = F.dispatch(tf.zeros((tf.shape(indices)[0], D)), plan)
            gates = tf.zeros(tf.shape(indices))
            return F.combine(rows, gates, plan), plan.overflow

    if way == "graph":
        run = tf.function(run, input_signature=[tf.TensorSpec((None, K), tf.int32)])
    outputs, overflow = run(tf.zeros((0, K), tf.int32))
    assert outputs.shape == (0, D)
    assert int(overflow) == 0


def test_nan_stays_in_its_row(rng, indices):
    x = rng.normal(size=(N, D))
    x[0] = np.nan  # what empty slots, and assignments without one, point at
    x, gates = tf.constant(x), tf.ones((N, K), tf.float64)
    kernel = tf.constant(rng.normal(size=(E, D, D)))
    with gpu_operations(), tf.GradientTape() as tape:
        tape.watch([x, gates])
        plan = F.make_capacity_plan(indices, E, 3)
        y = F.mix_experts(tf.matmul, x, gates, plan, [kernel])
        gradients = tape.gradient(y, [x, gates])
    for found in (y, *gradients):
        assert np.isfinite(found.numpy()[1:]).all()
    assert np.isnan(y.numpy()[0]).all()
