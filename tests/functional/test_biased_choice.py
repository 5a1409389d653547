import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients, dense_gates
from tests.oracles import routers as oracle

N, E = 7, 12
GROUPS = {"num_groups": 4, "num_kept_groups": 2}


@pytest.fixture
def logits(rng):
    return 2.0 * rng.normal(size=(N, E))


@pytest.fixture
def bias(rng):
    # Below and above the spread of the scores, so that it changes what is chosen.
    return rng.uniform(-0.6, 0.3, size=E)


@pytest.mark.parametrize("groups", [{}, GROUPS], ids=["", "groups"])
@pytest.mark.parametrize("normalization", ["selected", "none"])
@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_gates_equal_oracle_in_value_and_gradients(
    logits, bias, scores, normalization, groups
):
    def gates(logits):
        values, experts = F.biased_gating(
            logits, bias, 3, scores, normalization, **groups
        )
        assert experts.dtype == tf.int32
        return tf.reduce_sum(
            tf.one_hot(experts, E, dtype=values.dtype) * values[..., tf.newaxis], 1
        )

    assert_value_and_gradients(
        gates,
        lambda x: oracle.biased_gates(x, bias, 3, scores, normalization, **groups),
        [logits],
    )


def test_the_bias_chooses_and_is_in_no_gate_nor_gradient():
    # Scores 0.5, 0.73, 0.27; the bias puts the last one first.
    logits = tf.constant([[0.0, 1.0, -1.0]])
    bias = tf.constant([0.0, 0.0, 1.0])
    with tf.GradientTape() as tape:
        tape.watch(bias)
        gates, experts = F.biased_gating(logits, bias, 2, normalization="none")
        total = tf.reduce_sum(gates)
    assert experts.numpy().tolist() == [[2, 1]]
    np.testing.assert_allclose(gates, [[0.26894143, 0.7310586]], rtol=1e-6)
    assert tape.gradient(total, bias) is None


def test_experts_come_from_the_best_groups():
    # Groups of two; sums of s + b: 1.1, 1.2, 1.0. The best expert of all is out.
    scores = np.array([[0.95, 0.15, 0.55, 0.65, 0.5, 0.5]])
    logits = np.log(scores / (1.0 - scores))
    options = {"num_groups": 3, "num_kept_groups": 1}
    _, experts = F.biased_gating(logits, np.zeros(6), 2, **options)
    assert experts.numpy().tolist() == [[3, 2]]
    # By their largest score, as with softmax, group 0 is the best.
    _, experts = F.biased_gating(logits, np.zeros(6), 2, "softmax", **options)
    assert experts.numpy().tolist() == [[0, 1]]


def test_an_expert_with_a_bias_far_below_the_others_beats_another_group(logits):
    # All of the kept group are below 0, to which published code sets the rest.
    bias = np.full(E, -5.0)
    _, experts = F.biased_gating(logits, bias, 3, num_groups=4, num_kept_groups=1)
    assert len(set(experts.numpy()[0] // 3)) == 1


def test_all_groups_kept_is_no_group(logits, bias):
    plain = F.biased_gating(logits, bias, 3)
    grouped = F.biased_gating(logits, bias, 3, num_groups=4, num_kept_groups=4)
    for a, b in zip(plain, grouped, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [-1e30, -np.inf, np.inf, -200.0])
def test_scores_of_zero_or_one_give_finite_gates_and_gradients(value, bias):
    logits = tf.fill((2, E), tf.constant(value, tf.float32))
    with tf.GradientTape() as tape:
        tape.watch(logits)
        gates, _ = F.biased_gating(logits, bias, 3)
        total = tf.reduce_sum(gates**2)
    np.testing.assert_allclose(gates, np.full((2, 3), 1 / 3), rtol=1e-6)
    assert np.isfinite(tape.gradient(total, logits)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_cast_up(logits, bias, dtype):
    half = tf.cast(logits, dtype)
    gates, experts = F.biased_gating(half, bias, 3)
    assert gates.dtype == tf.float32
    np.testing.assert_allclose(
        dense_gates(gates, experts, E),
        oracle.biased_gates(tf.cast(half, tf.float64).numpy(), bias, 3),
        atol=1e-6,
    )


def test_no_tokens(bias):
    gates, experts = F.biased_gating(tf.zeros((0, E)), bias, 3, **GROUPS)
    assert gates.shape == experts.shape == (0, 3)


@pytest.mark.parametrize(
    ("counts", "signs"),
    # Means 2, 2, and 0.
    [([1, 2, 3], [1, 0, -1]), ([0, 0, 6], [1, 1, -1]), ([0, 0, 0], [0, 0, 0])],
)
def test_the_bias_moves_towards_the_mean(counts, signs):
    bias = np.array([0.5, -0.5, 0.0])
    found = F.balanced_bias(bias, counts, 0.25)
    np.testing.assert_allclose(found, bias + 0.25 * np.array(signs), rtol=1e-6)
    np.testing.assert_allclose(found, oracle.balanced_bias(bias, counts, 0.25))


def test_what_cannot_be_is_refused(logits, bias):
    with pytest.raises(ValueError, match="num_groups=5, num_experts=12"):
        F.biased_gating(logits, bias, 2, num_groups=5)
    with pytest.raises(ValueError, match="num_kept_groups=1, num_groups=4, 3 .*k=4"):
        F.biased_gating(logits, bias, 4, num_groups=4)
    with pytest.raises(ValueError, match="num_kept_groups=5"):
        F.biased_gating(logits, bias, 2, num_groups=4, num_kept_groups=5)
    with pytest.raises(ValueError, match="scores='relu'"):
        F.biased_gating(logits, bias, 2, "relu")
    with pytest.raises(ValueError, match="update_rate=-1"):
        F.balanced_bias(bias, np.ones(E), -1.0)
