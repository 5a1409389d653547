import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients
from tests.oracles import routers as oracle

N, E = 9, 5


@pytest.fixture
def logits(rng):
    return 1.5 * rng.normal(size=(N, E))


@pytest.fixture
def uniform(rng):
    return rng.uniform(size=N)


def dense(gates, experts):
    """`(N, E)`; expert -1 is none."""
    own = tf.one_hot(experts, E, dtype=gates.dtype) * gates[..., tf.newaxis]
    return tf.reduce_sum(own, axis=1)


@pytest.mark.parametrize("policy", ["all", "random", "threshold"])
def test_gates_equal_oracle_in_value_and_gradients(logits, uniform, policy):
    def gates(logits):
        values, experts = F.second_choice_gating(logits, policy, uniform, 0.3)
        unused = experts.numpy()[:, 1] < 0
        assert (unused.any(), unused.all()) == (policy != "all", False)
        return dense(values, experts)

    assert_value_and_gradients(
        gates, lambda x: oracle.second_choice(x, policy, uniform, 0.3), [logits]
    )


def test_worked_example():
    # Softmax over the two: 0.5, 0.5; then 0.7311, 0.2689, twice 0.5379.
    logits = np.array([[0.0, 0.0, -9.0], [-9.0, 1.0, 0.0], [-9.0, 1.0, 0.0]])
    _, experts = F.second_choice_gating(logits, "random", np.array([0.99, 0.53, 0.54]))
    assert experts.numpy().tolist() == [[0, 1], [1, 2], [1, -1]]
    _, experts = F.second_choice_gating(logits, "threshold", threshold=0.3)
    assert experts.numpy().tolist() == [[0, 1], [1, -1], [1, -1]]


def test_the_second_is_used_as_often_as_its_gate_says(rng):
    n = 20_000
    logits = np.tile([[1.0, 0.0, -9.0]], (n, 1))
    gates, experts = F.second_choice_gating(logits, "random", rng.uniform(size=n))
    share = np.exp(0.0) / (np.exp(1.0) + np.exp(0.0))
    # Five standard deviations of a share of n.
    assert np.mean(experts[:, 1] >= 0) == pytest.approx(2 * share, abs=5 * 0.5 / n**0.5)
    np.testing.assert_allclose(gates[:, 0], 1 - share, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_cast_up(logits, uniform, dtype):
    half = tf.cast(logits, dtype)
    gates, experts = F.second_choice_gating(half, "random", uniform)
    assert gates.dtype == tf.float32
    expected = oracle.second_choice(
        tf.cast(half, tf.float64).numpy(), "random", uniform
    )
    np.testing.assert_allclose(dense(gates, experts), expected, atol=1e-6)


def test_what_cannot_be_is_refused(logits):
    with pytest.raises(ValueError, match="policy='none'"):
        F.second_choice_gating(logits, "none")
    with pytest.raises(ValueError, match="uniform=None"):
        F.second_choice_gating(logits, "random")
    with pytest.raises(ValueError, match="k=2, num_experts=1"):
        F.second_choice_gating(logits[:, :1])
