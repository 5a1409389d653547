import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients
from tests.oracles import routers as oracle

N, E = 8, 5


@pytest.fixture
def logits(rng):
    return 2.0 * rng.normal(size=(N, E))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [0, 1, 3, N, N + 2])
def test_gates_equal_oracle_in_value_and_gradients(rng, logits, capacity, masked):
    mask = rng.random(N) < 0.6 if masked else None

    def gates(logits):
        values, selected = F.expert_choice_gating(logits, capacity, mask)
        taken = capacity if mask is None else min(capacity, mask.sum())
        assert (selected.numpy().sum(axis=0) == min(taken, N)).all()
        return values

    assert_value_and_gradients(
        gates, lambda x: oracle.expert_choice(x, capacity, mask), [logits]
    )


@pytest.mark.parametrize("num_experts", [1, 3, 4, 64])
@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25, 2.0, 70.0])
def test_capacity_equals_oracle(num_experts, factor):
    for num_tokens in (0, 1, 2, 5, 6, 7, 8, 1024, 10**6):
        found = F.expert_choice_capacity(num_tokens, num_experts, factor)
        assert found.dtype == tf.int32
        expected = oracle.expert_choice_capacity(num_tokens, num_experts, factor)
        assert int(found) == expected


def test_worked_example():
    # Softmax over two experts is decided by the difference: 3, 1, -1, -2.
    logits = np.array([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    _, selected = F.expert_choice_gating(logits, 3)
    expected = [[True, False], [True, True], [True, True], [False, True]]
    assert selected.numpy().tolist() == expected


def test_equal_tokens_are_taken_in_their_order():
    _, selected = F.expert_choice_gating(np.zeros((4, 2)), 2)
    assert selected.numpy().all(axis=1).tolist() == [True, True, False, False]


def test_a_token_of_nan_takes_no_place_and_is_seen(logits):
    logits[2] = np.nan
    gates, selected = F.expert_choice_gating(logits, 3)
    others = np.arange(N) != 2
    expected = oracle.expert_choice(logits[others], 3)
    np.testing.assert_allclose(gates.numpy()[others], expected, rtol=1e-6)
    assert selected.numpy()[2].tolist() == [True] + [False] * (E - 1)
    assert np.isnan(gates[2, 0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_cast_up(logits, dtype):
    half = tf.cast(logits, dtype)
    gates, _ = F.expert_choice_gating(half, 3)
    assert gates.dtype == tf.float32
    expected = oracle.expert_choice(tf.cast(half, tf.float64).numpy(), 3)
    np.testing.assert_allclose(gates, expected, atol=1e-6)
