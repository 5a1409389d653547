import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients, dense_gates
from tests.oracles import mixture as oracle

N, E, K = 7, 6, 2


@pytest.fixture
def logits(rng):
    return rng.normal(size=(N, E))


@pytest.fixture
def noisy_case(rng):
    clean, raw, noise = rng.normal(size=(3, N, E))
    return clean, raw, noise


def test_softmax_gating_equals_oracle(logits):
    assert_value_and_gradients(
        F.softmax_gating, lambda v: np.stack([oracle.softmax(r) for r in v]), [logits]
    )


@pytest.mark.parametrize("epsilon", [0.0, 1e-2, 0.5])
def test_noise_stddev_equals_oracle(logits, epsilon):
    assert_value_and_gradients(
        lambda v: F.noise_stddev(v, epsilon),
        lambda v: oracle.softplus(v) + epsilon,
        [logits],
    )


def test_noisy_logits_equals_oracle(noisy_case):
    assert_value_and_gradients(
        F.noisy_logits,
        lambda clean, stddev, noise: clean + stddev * noise,
        list(noisy_case),
    )


@pytest.mark.parametrize("normalization", ["selected", "all"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_top_k_gating_equals_oracle(logits, k, normalization):
    _, indices = F.top_k_gating(logits, k, normalization)
    np.testing.assert_array_equal(indices, [oracle.top_k(row, k) for row in logits])
    assert_value_and_gradients(
        lambda v: F.top_k_gating(v, k, normalization)[0],
        lambda v: np.take_along_axis(
            oracle.top_k_gates(v, k, normalization), indices.numpy(), axis=1
        ),
        [logits],
    )


@pytest.mark.parametrize("k", [1, 2, E - 1])
def test_prob_in_top_k_equals_oracle(noisy_case, k):
    clean, raw, noise = noisy_case
    stddev = oracle.softplus(raw) + 0.01
    assert_value_and_gradients(
        lambda c, n, s: F.prob_in_top_k(c, n, s, k),
        lambda c, n, s: oracle.prob_in_top_k(c, n, s, k),
        [clean, clean + noise * stddev, stddev],
    )


def test_gradient_of_load_flows_through_the_threshold(noisy_case):
    # The noisy logits enter P only as thresholds.
    clean, raw, noise = (tf.constant(a) for a in noisy_case)
    noisy = clean + noise
    with tf.GradientTape() as tape:
        tape.watch(noisy)
        total = F.load(F.prob_in_top_k(clean, noisy, F.noise_stddev(raw), K))[0]
    assert np.abs(tape.gradient(total, noisy).numpy()).max() > 0.01


@pytest.mark.parametrize("reduction", [F.importance_loss, F.load_loss])
def test_losses_equal_oracle(rng, reduction):
    values = rng.uniform(0.5, 2.0, size=E)
    assert_value_and_gradients(
        lambda v: reduction(v, 0.3), lambda v: 0.3 * oracle.cv_squared(v), [values]
    )


def test_importance_equals_oracle(logits):
    gates, indices = F.top_k_gating(logits, K)
    assert_value_and_gradients(
        lambda g: F.importance(g, indices, E),
        lambda g: dense_gates(g, indices, E).sum(axis=0),
        [gates.numpy()],
    )


def test_load_is_the_sum_over_real_tokens(rng):
    probs = rng.uniform(size=(N, E))
    mask = np.array([1, 1, 0, 1, 0, 1, 1], bool)
    assert_value_and_gradients(
        lambda p: F.load(p, mask), lambda p: p[mask].sum(axis=0), [probs]
    )


def test_cv_squared_of_a_worked_example():
    # Mean 2, population variance ((-1)**2 + 1**2) / 2 = 1, so 1 / 4.
    assert float(F.cv_squared(tf.constant([1.0, 3.0]))) == pytest.approx(0.25)


def test_cv_squared_has_zero_and_not_nan_gradient_at_perfect_balance():
    values = tf.constant([2.0, 2.0, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(values)
        result = F.cv_squared(values)
    assert float(result) == 0.0
    np.testing.assert_array_equal(tape.gradient(result, values), [0.0, 0.0, 0.0])


def test_cv_squared_of_no_tokens_is_zero():
    assert float(F.cv_squared(tf.zeros(4))) == 0.0


def test_expert_counts_leave_out_padding():
    counts = F.expert_counts(tf.constant([[0, 2], [2, -1], [-1, -1]]), 4)
    np.testing.assert_array_equal(counts, [1, 0, 2, 0])
    assert counts.dtype == tf.int32


def test_max_over_mean_of_a_worked_example():
    # Mean of 1, 2, 3, 6 is 3; 6 / 3 = 2.
    assert float(F.max_over_mean(tf.constant([1, 2, 3, 6]))) == 2.0
    assert float(F.max_over_mean(tf.zeros(3))) == 0.0


@pytest.mark.parametrize("k", [1, 3, E])
def test_gates_are_non_negative_sum_to_one_and_exactly_k_are_kept(logits, k):
    gates, indices = F.top_k_gating(logits, k)
    dense = dense_gates(gates, indices, E)
    assert (dense >= 0).all()
    np.testing.assert_allclose(dense.sum(axis=1), 1.0, rtol=1e-6)
    assert ((dense > 0).sum(axis=1) == k).all()


def test_k_equal_to_num_experts_is_softmax_gating(logits):
    gates, indices = F.top_k_gating(logits, E)
    np.testing.assert_allclose(
        dense_gates(gates, indices, E), F.softmax_gating(logits), rtol=1e-12
    )


def test_probability_gates_are_those_of_the_full_softmax(logits):
    gates, indices = F.top_k_gating(logits, 1, "all")
    np.testing.assert_allclose(
        gates, np.max(F.softmax_gating(logits), axis=1, keepdims=True), rtol=1e-12
    )


def test_adding_a_constant_to_every_logit_changes_no_gate_and_no_load(noisy_case):
    clean, raw, noise = noisy_case
    stddev = F.noise_stddev(raw)
    results = []
    for shift in (0.0, 5.0):
        noisy = F.noisy_logits(clean + shift, stddev, noise)
        results.append(
            (
                *F.top_k_gating(noisy, K),
                F.prob_in_top_k(clean + shift, noisy, stddev, K),
            )
        )
    for before, after in zip(*results, strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-9, atol=1e-12)


def test_expected_number_of_experts_over_noise_is_k(rng):
    samples = 20_000
    clean = np.repeat(rng.normal(size=(1, E)), samples, axis=0)
    stddev = np.repeat(rng.uniform(0.3, 2.0, size=(1, E)), samples, axis=0)
    noisy = clean + stddev * rng.normal(size=(samples, E))
    total = F.prob_in_top_k(clean, noisy, stddev, K).numpy().sum(axis=1)
    # Mean of independent samples: 4 standard errors.
    assert abs(total.mean() - K) < 4 * total.std() / np.sqrt(samples)


def test_probability_equals_a_monte_carlo_frequency(rng):
    samples = 20_000
    clean, stddev = rng.normal(size=E), rng.uniform(0.3, 2.0, size=E)
    noisy = clean + stddev * rng.normal(size=E)
    probs = F.prob_in_top_k(clean[None], noisy[None], stddev[None], K).numpy()[0]
    for i in range(E):
        redrawn = np.repeat(noisy[None], samples, axis=0)
        redrawn[:, i] = clean[i] + stddev[i] * rng.normal(size=samples)
        _, chosen = F.top_k_gating(redrawn, K)
        frequency = (chosen.numpy() == i).any(axis=1).mean()
        error = np.sqrt(probs[i] * (1 - probs[i]) / samples)
        assert abs(frequency - probs[i]) <= 4 * error + 1e-9, i


def test_the_expert_itself_is_left_out_of_its_threshold():
    # Noisy 3, 2, 1 with k=1: expert 0 is in and measured against 2; the others
    # are out and measured against 3.
    noisy = tf.constant([[3.0, 2.0, 1.0]])
    clean = tf.constant([[2.0, 3.0, 3.0]])
    probs = F.prob_in_top_k(clean, noisy, tf.ones_like(noisy), 1)
    np.testing.assert_allclose(probs, [[0.5, 0.5, 0.5]], atol=1e-6)


def test_a_chosen_expert_counts_as_in_even_if_it_ties_at_the_boundary():
    # k=2 of four equal noisy logits chooses experts 0 and 1. All thresholds
    # are 1 either way; with 2, 1, 1 and k=2 expert 1 is in, expert 2 out.
    noisy = tf.constant([[2.0, 1.0, 1.0]])
    clean = tf.constant([[1.0, 1.0, 2.0]])
    probs = F.prob_in_top_k(clean, noisy, tf.ones_like(noisy), 2)
    # Expert 0: threshold 1 -> 0.5. Expert 1: in, threshold 1 -> 0.5.
    # Expert 2: out, threshold is the second value 1 -> Phi(1) = 0.841.
    np.testing.assert_allclose(probs, [[0.5, 0.5, 0.8413447]], atol=1e-6)


def test_ties_go_to_the_lowest_index_and_no_expert_is_chosen_twice():
    _, indices = F.top_k_gating(tf.zeros((2, 5)), 3)
    np.testing.assert_array_equal(indices, [[0, 1, 2], [0, 1, 2]])


@pytest.mark.parametrize("k", [2, 3])
def test_experts_masked_out_with_minus_infinity_are_never_chosen_twice(k):
    logits = tf.constant([[1.0, -np.inf, -np.inf, -np.inf]])
    gates, indices = F.top_k_gating(logits, k)
    assert len(set(indices.numpy()[0])) == k
    np.testing.assert_allclose(gates.numpy()[0], [1.0] + [0.0] * (k - 1))


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_logits_give_finite_gates_probabilities_and_gradients(value):
    clean = tf.constant([[0.5, value, 0.1, value]])
    stddev = tf.ones_like(clean)
    with tf.GradientTape() as tape:
        tape.watch(clean)
        gates, _ = F.top_k_gating(clean, 2)
        probs = F.prob_in_top_k(clean, clean, stddev, 2)
        total = tf.reduce_sum(gates) + tf.reduce_sum(probs)
    for result in (gates, probs, tape.gradient(total, clean)):
        assert np.isfinite(result.numpy()).all()
    assert (probs.numpy() >= 0).all()
    assert (probs.numpy() <= 1).all()


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_precision_logits_are_treated_in_float32(rng, dtype):
    logits = tf.cast(rng.normal(size=(N, E)), dtype)
    stddev = F.noise_stddev(logits)
    probs = F.prob_in_top_k(logits, logits, stddev, K)
    gates, indices = F.top_k_gating(logits, K)
    assert {stddev.dtype, probs.dtype, gates.dtype} == {tf.float32}
    exact = logits.numpy().astype("float64")
    np.testing.assert_allclose(
        probs,
        oracle.prob_in_top_k(exact, exact, oracle.softplus(exact) + 0.01, K),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        dense_gates(gates, indices, E), oracle.top_k_gates(exact, K), atol=1e-5
    )


def test_prob_in_top_k_refuses_k_equal_to_num_experts(logits):
    with pytest.raises(ValueError, match=r"k=6, num_experts=6"):
        F.prob_in_top_k(logits, logits, np.ones_like(logits), E)


@pytest.mark.parametrize("k", [0, -1, E + 1, 1.5, True])
def test_top_k_gating_refuses_a_k_out_of_range(logits, k):
    with pytest.raises(ValueError, match=rf"k={k}"):
        F.top_k_gating(logits, k)


def test_top_k_gating_refuses_an_unknown_normalization(logits):
    with pytest.raises(ValueError, match="normalization='none'"):
        F.top_k_gating(logits, K, "none")


@pytest.mark.parametrize("weight", [-0.1, np.nan, np.inf])
def test_losses_refuse_bad_weights(weight):
    with pytest.raises(ValueError, match="`weight`"):
        F.importance_loss(tf.ones(3), weight)
    with pytest.raises(ValueError, match="`weight`"):
        F.load_loss(tf.ones(3), weight)


def test_noise_stddev_refuses_a_negative_epsilon(logits):
    with pytest.raises(ValueError, match="noise_epsilon=-0.5"):
        F.noise_stddev(logits, -0.5)


def test_a_tiny_noise_scale_gives_no_nan_gradient(rng):
    clean = tf.constant(rng.normal(size=(5, 6)), tf.float32)
    stddev = tf.fill((5, 6), 1e-30)
    with tf.GradientTape() as tape:
        tape.watch([clean, stddev])
        noisy = F.noisy_logits(clean, stddev, tf.ones_like(clean))
        total = tf.reduce_sum(F.prob_in_top_k(clean, noisy, stddev, 2))
    assert float(total) == 10.0  # 5 tokens, 2 experts each, for certain
    for gradient in tape.gradient(total, [clean, stddev]):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-45, 1e-30, 1e-20, 1e-7, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_least_noise_gives_finite_gradients_at_ties(rng, epsilon, dtype):
    # Equal logits, and a noise that softplus takes to 0: only epsilon is left.
    clean = tf.zeros((5, 6), dtype)
    raw = tf.constant([[-1e30] * 6, [-200.0] * 6, [-90.0] * 6, [-30.0] * 6, [0.0] * 6])
    raw, noise = tf.cast(raw, dtype), tf.constant(rng.normal(size=(5, 6)), dtype)
    with tf.GradientTape() as tape:
        tape.watch([clean, raw])
        stddev = F.noise_stddev(raw, epsilon)
        noisy = F.noisy_logits(clean, stddev, noise)
        probs = F.prob_in_top_k(clean, noisy, stddev, 2)
        loss = F.load_loss(F.load(probs))
    assert np.isfinite(loss)
    for gradient in tape.gradient(loss, [clean, raw]):
        # And their squares, which optimizers take.
        assert np.isfinite(tf.square(tf.convert_to_tensor(gradient))).all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-45, 1e-30])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0])
def test_cv_squared_is_finite_with_any_epsilon(epsilon, value):
    values = tf.fill([4], value)
    with tf.GradientTape() as tape:
        tape.watch(values)
        result = F.cv_squared(values, epsilon)
    assert float(result) == 0.0
    np.testing.assert_array_equal(tape.gradient(result, values), np.zeros(4))
    with pytest.raises(ValueError, match="epsilon=-1"):
        F.cv_squared(values, -1.0)


@pytest.mark.parametrize("normalization", ["selected", "all"])
def test_sorting_once_changes_no_value_and_no_gradient(rng, normalization):
    clean = tf.constant(rng.normal(size=(7, 5)))
    stddev = tf.constant(rng.random((7, 5)) + 0.1)
    noise = tf.constant(rng.normal(size=(7, 5)))
    noise = tf.concat([tf.zeros((2, 5), noise.dtype), noise[2:]], axis=0)
    clean = tf.concat([tf.zeros((1, 5), clean.dtype), clean[1:]], axis=0)  # ties
    found = []
    for shared in (False, True):
        with tf.GradientTape() as tape:
            tape.watch([clean, stddev])
            noisy = F.noisy_logits(clean, stddev, noise)
            largest = F.largest_logits(noisy, 2) if shared else None
            gates, indices = F.top_k_gating(noisy, 2, normalization, largest)
            probs = F.prob_in_top_k(clean, noisy, stddev, 2, largest)
            total = tf.reduce_sum(tf.sin(probs)) + tf.reduce_sum(gates[:, 0] ** 2)
        gradients = tape.gradient(total, [clean, stddev])
        found.append([gates, indices, probs, *gradients])
    for alone, shared in zip(*found, strict=True):
        np.testing.assert_allclose(shared, alone, rtol=1e-12, atol=1e-14)


def test_largest_logits_of_a_worked_example():
    values, indices = F.largest_logits(tf.constant([[1.0, 3.0, 3.0, 2.0]]), 2)
    assert values.numpy().tolist() == [[3.0, 3.0, 2.0]]
    assert indices.numpy().tolist() == [[1, 2, 3]]
    with pytest.raises(ValueError, match="k=4.*num_experts=4"):
        F.largest_logits(tf.zeros((1, 4)), 4)


@pytest.mark.parametrize("normalization", ["selected", "all"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_noisy_top_k_gating_equals_the_oracle(rng, k, normalization):
    num_experts = 5
    clean, raw, noise = (rng.normal(size=(6, num_experts)) for _ in range(3))

    def of(part):
        def run(clean, raw):
            gates, experts, probs = F.noisy_top_k_gating(
                clean, raw, noise, k, normalization, 0.1
            )
            return gates if part == "gates" else probs

        def expected(clean, raw):
            stddev = oracle.softplus(raw) + 0.1
            noisy = clean + noise * stddev
            if part == "probs":
                return oracle.prob_in_top_k(clean, noisy, stddev, k)
            dense = oracle.top_k_gates(noisy, k, normalization)
            chosen = [oracle.top_k(row, k) for row in noisy]
            return np.take_along_axis(dense, np.array(chosen), axis=1)

        return run, expected

    if k > 1 or normalization == "all":  # otherwise gates are constant
        assert_value_and_gradients(*of("gates"), [clean, raw], rtol=1e-5)
    if k < num_experts:
        assert_value_and_gradients(*of("probs"), [clean, raw], rtol=1e-5)
    else:
        np.testing.assert_array_equal(of("probs")[0](clean, raw), np.ones((6, 5)))
