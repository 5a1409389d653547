import numpy as np
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients


def test_hierarchical_gates_equal_oracle(rng):
    primary, secondary = rng.uniform(size=4), rng.uniform(size=(4, 2))
    groups = np.array([2, 0, 1, 1], "int32")
    chosen = np.array([[0, 3], [2, 1], [3, 0], [1, 2]], "int32")
    _, experts = F.hierarchical_gates(primary, groups, secondary, chosen, 4)
    # Group 2 begins at 8, group 0 at 0, group 1 at 4.
    np.testing.assert_array_equal(experts, [[8, 11], [2, 1], [7, 4], [5, 6]])
    assert_value_and_gradients(
        lambda p, s: F.hierarchical_gates(p, groups, s, chosen, 4)[0],
        lambda p, s: np.array([[p[m] * s[m, j] for j in range(2)] for m in range(4)]),
        [primary, secondary],
    )


def test_hierarchical_load_equals_oracle(rng):
    counts = np.array([3, 5], "int32")
    assert_value_and_gradients(
        lambda p, s: F.hierarchical_load(p, s, counts),
        lambda p, s: np.array(
            [p[i] * s[i, j] / counts[i] for i in range(2) for j in range(3)]
        ),
        [rng.uniform(1, 4, size=2), rng.uniform(0, 3, size=(2, 3))],
    )


def test_load_of_a_group_without_tokens_is_zero_and_has_a_finite_gradient():
    primary = tf.constant([0.5, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(primary)
        load = F.hierarchical_load(primary, tf.constant([[0.0], [2.0]]), [0, 2])
    np.testing.assert_array_equal(load, [0.0, 2.0])
    np.testing.assert_array_equal(tape.gradient(load, primary), [0.0, 1.0])


def test_hierarchical_load_reaches_the_primary_gate_and_the_simple_form_does_not(rng):
    logits = tf.constant(rng.normal(size=(6, 3)))
    within = tf.constant(rng.uniform(size=(3, 2)))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(logits)
        probs = F.prob_in_top_k(logits, logits, tf.ones_like(logits), 1)
        _, groups = F.top_k_gating(logits, 1)
        full = F.hierarchical_load(F.load(probs), within, F.expert_counts(groups, 3))
        total = F.load_loss(full)
        simple = F.load_loss(within)
    assert np.abs(tape.gradient(total, logits)).max() > 1e-3
    assert tape.gradient(simple, logits) is None
