import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional, telemetry
from tests.helpers import assert_value_and_gradients
from tests.oracles import telemetry as oracle


def test_usage_equals_the_oracle(rng):
    importance = rng.uniform(size=7)
    counts = rng.integers(0, 3, size=7).astype("float64")
    counts[2] = 0
    found = telemetry.usage_statistics(telemetry.UsageTotals(importance, counts))
    expected = oracle.usage(importance, counts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_entropy_and_overflow_are_reported_where_they_are_known():
    counts = np.array([6.0, 2.0])
    totals = telemetry.UsageTotals(counts / 2, counts, 2.0, 1.2, 4.0)
    found = telemetry.usage_statistics(totals, has_capacity=True)
    assert found["gate_entropy"] == pytest.approx(0.3)
    assert found["overflow"] == pytest.approx(0.25)  # 2 of 8 assignments
    unknown = telemetry.usage_statistics(totals._replace(entropy=0.0, tokens=0.0))
    assert "gate_entropy" not in unknown
    assert "overflow" not in unknown


def test_nothing_counted_gives_zeros():
    found = telemetry.usage_statistics(telemetry.UsageTotals(np.zeros(3), np.zeros(3)))
    assert found == {
        "importance_cv": 0.0,
        "load_cv": 0.0,
        "max_over_mean_load": 0.0,
        "dead_experts": 3,
    }


def test_totals_since_before_and_since_a_reset():
    before = telemetry.UsageTotals(np.array([1.0, 1.0]), np.array([2.0, 2.0]), 1, 1, 2)
    after = telemetry.UsageTotals(np.array([1.5, 3.0]), np.array([3.0, 6.0]), 1, 3, 5)
    window = after.since(before)
    np.testing.assert_array_equal(window.counts, [1.0, 4.0])
    assert (window.overflow, window.entropy, window.tokens) == (0, 2, 3)
    # An expert that counts less than before: everything is new.
    assert before.since(after) is before


def test_gate_entropy_equals_the_oracle(rng):
    gates = rng.uniform(0.05, 1.0, size=(5, 3))

    def summed(g):
        return functional.gate_entropy(g, 5)[0]

    assert_value_and_gradients(summed, oracle.gate_entropy, [gates])


def test_gate_entropy_of_zero_gates_and_of_padding():
    gates = tf.constant([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    entropy, tokens = functional.gate_entropy(gates, 3)
    assert float(entropy) == pytest.approx(2 * np.log(2))
    assert int(tokens) == 3
    mask = tf.constant([True, True, False])
    entropy, tokens = functional.gate_entropy(gates, 3, mask)
    assert float(entropy) == pytest.approx(np.log(2))
    assert int(tokens) == 2
    # Numbers of experts that vary: 3 tokens, one of them with all its weight on one.
    flat, tokens = functional.gate_entropy(tf.constant([1.0, 0.5, 0.5]), 3)
    assert float(flat) == pytest.approx(np.log(2))
    assert int(tokens) == 3
