import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients
from tests.oracles import balancing as oracle

N, E, M = 8, 5, 3


@pytest.fixture
def logits(rng):
    return rng.normal(size=(N, E))


@pytest.fixture
def gates(logits):
    return oracle.softmax_gates(logits)


@pytest.fixture
def thresholds(rng):
    # Around the mean of the gates, so that some pass and some do not.
    return rng.uniform(0.1, 0.3, size=E)


@pytest.mark.parametrize(
    ("num_experts", "k"), [(1, 1), (3, 2), (3, 3), (4, 1), (4, 3), (64, 1), (64, 3)]
)
def test_tokens_per_expert_equals_oracle(num_experts, k):
    for num_tokens in (0, 1, 2, 5, 6, 7, 8, 1024):
        m = F.tokens_per_expert(num_tokens, num_experts, k)
        assert m.dtype == tf.int32
        assert int(m) == oracle.tokens_per_expert(num_tokens, num_experts, k)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "expected"),
    # k N / E: 8/4 = 2; 6/4 = 1.5, up; 5/4 = 1.25, down; 1/8, at least 1; no
    # token; every token; 10/4 = 2.5, up (not to the even 2); past 2**31 / k.
    [
        (4, 4, 2, 2),
        (3, 4, 2, 2),
        (5, 4, 1, 1),
        (1, 8, 1, 1),
        (0, 8, 1, 0),
        (7, 3, 3, 7),
        (5, 4, 2, 3),
        (2**31 - 1, 4, 4, 2**31 - 1),
    ],
)
def test_tokens_per_expert_of_worked_examples(num_tokens, num_experts, k, expected):
    assert int(F.tokens_per_expert(num_tokens, num_experts, k)) == expected


@pytest.mark.parametrize("m", [0, 1, M, N])
def test_batchwise_mask_equals_oracle(gates, m):
    mask = F.batchwise_mask(gates, m)
    assert mask.dtype == tf.bool
    np.testing.assert_array_equal(mask, oracle.batchwise_mask(gates, m))


def test_batchwise_mask_of_a_worked_example():
    # m = 1: column 0 is largest in row 1, column 1 in row 0.
    mask = F.batchwise_mask([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], 1)
    np.testing.assert_array_equal(mask, [[0, 1], [1, 0], [0, 0]])


@pytest.mark.parametrize("m", [0, 1, 3, 6])
def test_ties_go_to_the_first_tokens_and_counts_stay_exact(m):
    mask = F.batchwise_mask(np.full((6, 4), 0.25), m).numpy()
    expected = np.zeros((6, 4), bool)
    expected[:m] = True
    np.testing.assert_array_equal(mask, expected)


def test_ties_at_the_boundary_keep_counts_exact(rng):
    # Few distinct values: the m-th and the next are equal in most columns.
    gates = rng.integers(3, size=(50, 6)) / 4.0
    mask = F.batchwise_mask(gates, 20).numpy()
    assert (mask.sum(axis=0) == 20).all()
    np.testing.assert_array_equal(mask, oracle.batchwise_mask(gates, 20))


def test_a_column_takes_no_more_than_all_tokens(gates):
    assert F.batchwise_mask(gates, N + 3).numpy().all()


def test_threshold_mask_equals_oracle(gates, thresholds):
    mask = F.threshold_mask(gates, thresholds)
    assert mask.dtype == tf.bool
    expected = oracle.threshold_mask(gates, thresholds)
    assert 0 < expected.sum() < N * E
    np.testing.assert_array_equal(mask, expected)


def test_a_gate_at_its_threshold_is_not_selected():
    # Equation 19 says greater, not greater or equal.
    mask = F.threshold_mask([[0.5, 0.5]], [0.5, 0.25])
    np.testing.assert_array_equal(mask, [[False, True]])


@pytest.mark.parametrize("which", ["batchwise", "threshold", "all", "empty"])
def test_masked_gating_equals_oracle(logits, gates, thresholds, which):
    mask = {
        "batchwise": oracle.batchwise_mask(gates, M),
        "threshold": oracle.threshold_mask(gates, thresholds),
        "all": np.ones((N, E), bool),
        "empty": np.zeros((N, E), bool),
    }[which]
    if which == "threshold":
        mask[2] = False  # an empty row among others
    assert_value_and_gradients(
        lambda v: F.masked_gating(v, mask),
        lambda v: oracle.masked_gates(oracle.softmax_gates(v), mask),
        [logits],
    )


def test_masked_gates_sum_to_one_or_to_nothing(logits):
    mask = oracle.batchwise_mask(oracle.softmax_gates(logits), 1)
    gates = F.masked_gating(logits, mask).numpy()
    assert (gates >= 0).all()
    np.testing.assert_array_equal(gates > 0, mask)
    assert not mask.any(axis=1).all()
    np.testing.assert_allclose(gates.sum(axis=1), mask.any(axis=1), rtol=1e-12)


def test_masked_gating_of_everything_is_softmax_gating(logits):
    gates = F.masked_gating(logits, np.ones((N, E), bool))
    np.testing.assert_allclose(gates, F.softmax_gating(logits), rtol=1e-12)


def test_vanishing_and_infinite_logits_give_finite_gates_and_gradients():
    # Softmax gates of the selected experts underflow: 0 / 0 in equation 16.
    logits = tf.constant(
        [[500.0, 0.0, -1.0], [np.inf, 0.0, -np.inf], [-np.inf, np.inf, 1.0]]
    )
    mask = [[False, True, True], [False, False, True], [False, False, False]]
    with tf.GradientTape() as tape:
        tape.watch(logits)
        gates = F.masked_gating(logits, mask)
        total = tf.reduce_sum(gates * [1.0, 2.0, 3.0])
    e = np.exp(-1.0)
    np.testing.assert_allclose(
        gates, [[0, 1 / (1 + e), e / (1 + e)], [0, 0, 1], [0, 0, 0]], rtol=1e-6
    )
    assert np.isfinite(tape.gradient(total, logits)).all()


@pytest.mark.parametrize("m", [0, 1, M, N])
def test_threshold_loss_equals_oracle(gates, thresholds, m):
    # Gradients of the thresholds only; the gates get none (next test).
    assert_value_and_gradients(
        lambda t: F.threshold_loss(gates, t, m),
        lambda t: oracle.threshold_loss(gates, t, m),
        [thresholds],
    )


def test_threshold_loss_gives_the_gates_no_gradient(gates, thresholds):
    gates = tf.constant(gates)
    with tf.GradientTape() as tape:
        tape.watch(gates)
        loss = F.threshold_loss(gates, thresholds, M)
    assert float(loss) > 0.0
    assert tape.gradient(loss, gates) is None


def test_gradient_of_thresholds_is_the_difference_of_the_counts(gates, thresholds):
    thresholds = tf.constant(thresholds)
    with tf.GradientTape() as tape:
        tape.watch(thresholds)
        loss = F.threshold_loss(gates, thresholds, M)
    admitted = oracle.threshold_mask(gates, thresholds.numpy()).sum(axis=0)
    assert len(set(admitted)) > 1
    np.testing.assert_array_equal(tape.gradient(loss, thresholds), M - admitted)


def test_threshold_loss_of_a_worked_example():
    # Column 0: batchwise row 1, threshold 0.1 admits all three: (0.2 - 0.1)
    # + (0.5 - 0.1) = 0.5. Column 1: batchwise row 0, threshold 0.9 admits none:
    # -(0.8 - 0.9) = 0.1.
    loss = F.threshold_loss([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]], [0.1, 0.9], 1)
    assert float(loss) == pytest.approx(0.6)


def test_threshold_loss_is_positive_unless_the_masks_agree(rng):
    agreed = 0
    for _ in range(100):
        gates = oracle.softmax_gates(rng.normal(size=(4, 3)))
        thresholds = rng.uniform(0.2, 0.45, size=3)
        same = (
            oracle.threshold_mask(gates, thresholds) == oracle.batchwise_mask(gates, 2)
        ).all()
        loss = float(F.threshold_loss(gates, thresholds, 2))
        assert loss == 0.0 if same else loss > 0.0
        agreed += same
    assert 0 < agreed < 100


def test_thresholds_descend_to_between_the_mth_and_the_next_gate(rng):
    gates = oracle.softmax_gates(rng.normal(size=(40, E)))
    m = 16
    thresholds = tf.Variable(np.full(E, 1.0 / E))

    @tf.function
    def descend(rate):
        with tf.GradientTape() as tape:
            loss = F.threshold_loss(gates, thresholds, m) / len(gates)
        thresholds.assign_sub(rate * tape.gradient(loss, thresholds))

    for step in range(400):
        descend(tf.constant(0.1 / np.sqrt(1 + step), tf.float64))
    ordered = np.sort(gates, axis=0)[::-1]
    assert (ordered[m] <= thresholds.numpy()).all()
    assert (thresholds.numpy() < ordered[m - 1]).all()
    assert float(F.threshold_loss(gates, thresholds, m)) == 0.0
    np.testing.assert_array_equal(
        F.threshold_mask(gates, thresholds), F.batchwise_mask(gates, m)
    )


def test_permuting_tokens_and_experts_permutes_masks_and_keeps_the_loss(
    rng, gates, thresholds
):
    rows, columns = rng.permutation(N), rng.permutation(E)
    moved = gates[rows][:, columns]
    for mask, of_moved in (
        (F.batchwise_mask(gates, M), F.batchwise_mask(moved, M)),
        (
            F.threshold_mask(gates, thresholds),
            F.threshold_mask(moved, thresholds[columns]),
        ),
    ):
        np.testing.assert_array_equal(mask.numpy()[rows][:, columns], of_moved)
    np.testing.assert_allclose(
        F.threshold_loss(moved, thresholds[columns], M),
        F.threshold_loss(gates, thresholds, M),
        rtol=1e-12,
    )


def test_no_tokens():
    nothing = tf.zeros((0, E))
    mask = F.batchwise_mask(nothing, F.tokens_per_expert(0, E, 2))
    assert mask.shape == (0, E)
    assert F.threshold_mask(nothing, tf.zeros(E)).shape == (0, E)
    assert F.masked_gating(nothing, mask).shape == (0, E)
    assert float(F.threshold_loss(nothing, tf.zeros(E), 0)) == 0.0


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_is_treated_in_float32(logits, gates, thresholds, dtype):
    half = tf.cast(gates, dtype)
    exact = tf.cast(half, tf.float64).numpy()
    np.testing.assert_array_equal(
        F.batchwise_mask(half, M), oracle.batchwise_mask(exact, M)
    )
    np.testing.assert_array_equal(
        F.threshold_mask(half, thresholds), oracle.threshold_mask(exact, thresholds)
    )
    loss = F.threshold_loss(half, thresholds, M)
    assert loss.dtype == tf.float32
    np.testing.assert_allclose(
        loss, oracle.threshold_loss(exact, thresholds, M), rtol=1e-5
    )
    mask = oracle.batchwise_mask(exact, M)
    assert F.masked_gating(tf.cast(logits, dtype), mask).dtype == tf.float32


def test_traced_with_unknown_tokens_equals_eager(logits, thresholds):
    def all_of_it(logits):
        gates = F.softmax_gating(logits)
        m = F.tokens_per_expert(tf.shape(logits)[0], E, 2)
        mask = F.batchwise_mask(gates, m)
        return (
            mask,
            F.masked_gating(logits, mask),
            F.threshold_loss(gates, thresholds, m),
        )

    traced = tf.function(
        all_of_it, input_signature=[tf.TensorSpec([None, E], tf.float64)]
    )
    for one, other in zip(traced(logits), all_of_it(logits), strict=True):
        np.testing.assert_allclose(
            tf.cast(one, tf.float64), tf.cast(other, tf.float64), rtol=1e-12
        )


def test_refuses_gates_and_thresholds_of_wrong_shape(gates, thresholds):
    with pytest.raises(ValueError, match=r"gates.shape=\(5,\)"):
        F.batchwise_mask(gates[0], 1)
    with pytest.raises(ValueError, match=r"gates.shape=\(5,\)"):
        F.threshold_mask(gates[0], thresholds)
    with pytest.raises(ValueError, match=r"thresholds.shape=\(4,\), gates.shape"):
        F.threshold_mask(gates, thresholds[:4])
    with pytest.raises(ValueError, match=r"thresholds.shape=\(\), gates.shape"):
        F.threshold_loss(gates, 0.5, 1)


@pytest.mark.parametrize(("num_experts", "k"), [(4, 5), (4, 0), (0, 1), (4, 1.5)])
def test_tokens_per_expert_refuses_what_does_not_fit(num_experts, k):
    with pytest.raises(ValueError, match="Received"):
        F.tokens_per_expert(8, num_experts, k)
