import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional, layers
from keras_moe.layers.initializers import PerExpertInitializer
from tests.oracles import mixture as oracle


def test_gate_weights_begin_at_zero_without_bias():
    gate = layers.NoisyTopKGating(k=2, num_experts=5)
    gate.build((None, 3))
    assert [w.name for w in gate.trainable_weights] == ["gate_kernel", "noise_kernel"]
    for weight in gate.get_weights()[:2]:
        np.testing.assert_array_equal(weight, np.zeros((3, 5)))


def test_an_untrained_gate_without_noise_breaks_ties_to_the_first_experts():
    gate = layers.NoisyTopKGating(k=2, num_experts=5)
    result = gate(np.ones((4, 3), "float32"), training=False)
    np.testing.assert_array_equal(result.statistics.counts, [4, 4, 0, 0, 0])
    # The load is the true count in evaluation, not a smooth estimate.
    np.testing.assert_array_equal(result.statistics.load, [4.0, 4.0, 0.0, 0.0, 0.0])


def test_an_untrained_gate_with_noise_spreads_the_tokens():
    gate = layers.NoisyTopKGating(k=2, num_experts=5, seed=0)
    counts = gate(np.ones((2000, 3), "float32"), training=True).statistics.counts
    # Mean 800, binomial standard deviation sqrt(2000 * 0.4 * 0.6) = 22.
    assert np.abs(counts.numpy() - 800).max() < 4 * 22


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.SoftmaxGating(),
        lambda: layers.TopKGating(k=2),
        lambda: layers.NoisyTopKGating(k=2),
    ],
)
def test_a_gate_by_itself_needs_num_experts_and_two_axes(make):
    with pytest.raises(ValueError, match="num_experts=None"):
        make()(np.ones((2, 3), "float32"))
    gate = make()
    gate.num_experts = 4
    with pytest.raises(ValueError, match=r"rank=3"):
        gate(np.ones((2, 2, 3), "float32"))


def test_bad_gate_arguments_are_refused():
    with pytest.raises(ValueError, match="k=5, num_experts=4"):
        layers.NoisyTopKGating(k=5, num_experts=4)
    with pytest.raises(ValueError, match="normalization='softmax'"):
        layers.TopKGating(normalization="softmax")
    with pytest.raises(ValueError, match="noise_epsilon=-1"):
        layers.NoisyTopKGating(noise_epsilon=-1)


@pytest.mark.parametrize(
    "initializer", ["glorot_uniform", "he_normal", "lecun_uniform"]
)
def test_every_expert_starts_as_a_single_layer_would(initializer):
    values = tf.convert_to_tensor(
        PerExpertInitializer(initializer)((40, 60, 30))
    ).numpy()
    single = keras.initializers.get(initializer)((6000, 3000))
    # Variances of one (60, 30) matrix are 100 times those of (6000, 3000).
    expected = 10 * np.std(single)
    assert values.std() == pytest.approx(expected, rel=0.02)
    assert np.abs(values[0] - values[1]).max() > 0.01


@pytest.mark.parametrize("kind", [layers.FeedForwardExperts, layers.GatedExperts])
def test_a_tenth_of_the_variance_is_that_of_one_experts_fan_in(kind):
    # Switch Transformers, section 2.4: stddev sqrt(0.1 / fan_in), cut at two of them.
    small = keras.initializers.VarianceScaling(0.1, "fan_in", "truncated_normal")
    experts = kind(16, 90, kernel_initializer=small)
    experts.build((None, 60))
    for kernel in experts.kernels:
        fan_in, values = kernel.shape[1], kernel.numpy()
        wanted = (0.1 / fan_in) ** 0.5
        for one in values:  # of 5,400 elements: 0.96 % is one standard error
            assert one.std() == pytest.approx(wanted, rel=0.04)
            assert np.abs(one).max() <= 2.0 * wanted / 0.8796
        assert np.abs(values[0] - values[1]).max() > wanted


def test_seeded_initializers_repeat_but_differ_between_experts():
    for base in (
        keras.initializers.GlorotNormal(seed=1),
        keras.initializers.Orthogonal(seed=1),
    ):
        first, second = (
            tf.convert_to_tensor(PerExpertInitializer(base)((3, 4, 4))).numpy()
            for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)
        assert np.abs(first[0] - first[1]).max() > 0.01


def test_orthogonal_is_orthogonal_for_each_expert():
    values = tf.convert_to_tensor(PerExpertInitializer("orthogonal")((3, 4, 4))).numpy()
    for value in values:
        np.testing.assert_allclose(value.T @ value, np.eye(4), atol=1e-5)


def test_bad_experts_are_refused():
    with pytest.raises(ValueError, match="hidden_units=0"):
        layers.FeedForwardExperts(2, 0)
    with pytest.raises(ValueError, match=r"hidden_units=\[\]"):
        layers.FeedForwardExperts(2, [])
    with pytest.raises(ValueError, match="output_units=-1"):
        layers.FeedForwardExperts(2, 4, output_units=-1)
    with pytest.raises(ValueError, match=r"shape=\(3, 4, 5\), num_experts=2"):
        layers.FeedForwardExperts(2, 4)(np.ones((3, 4, 5), "float32"))


def test_projected_lstm_equals_oracle_in_value_and_gradients(rng):
    cell = layers.ProjectedLSTMCell(3, projection_units=2, dtype="float64")
    layer = keras.layers.RNN(cell, return_sequences=True, dtype="float64")
    x = rng.normal(size=(2, 4, 5))
    layer(x)
    arrays = [rng.normal(size=w.shape) for w in layer.get_weights()]
    layer.set_weights(arrays)

    def expected(x, *weights):
        h, c = np.zeros((2, 2)), np.zeros((2, 3))
        outputs = []
        for t in range(4):
            h, c = oracle.lstm_step(x[:, t], h, c, *weights)
            outputs.append(h)
        return np.stack(outputs, axis=1)

    np.testing.assert_allclose(layer(x), expected(x, *arrays), rtol=1e-9)
    weights = rng.normal(size=(2, 4, 2))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(x) * weights)
    wanted = oracle.numerical_gradients(
        lambda *a: float(np.sum(weights * expected(x, *a))), arrays
    )
    gradients = tape.gradient(total, [v.value for v in layer.trainable_variables])
    for gradient, numbers in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, numbers, rtol=1e-5, atol=1e-7)


def test_projected_lstm_with_identity_projection_is_a_keras_lstm(rng):
    layer = keras.layers.RNN(layers.ProjectedLSTMCell(3, projection_units=3))
    plain = keras.layers.LSTM(3)
    x = rng.normal(size=(2, 4, 5)).astype("float32")
    layer(x), plain(x)
    layer.set_weights([*plain.get_weights(), np.eye(3)])
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-6)


def test_forget_gates_begin_open():
    cell = layers.ProjectedLSTMCell(2, projection_units=1)
    cell.build((None, 3))
    np.testing.assert_array_equal(cell.bias, [0, 0, 1, 1, 0, 0, 0, 0])


def test_gates_and_plan_come_together(rng):
    tokens = rng.normal(size=(6, 3)).astype("float32")
    result = layers.NoisyTopKGating(k=2, num_experts=4)(tokens)
    plan = functional.make_plan(result)
    experts = layers.FeedForwardExperts(4, hidden_units=8)
    assert experts(tokens, gates=result.gates, plan=plan).shape == (6, 3)
    with pytest.raises(ValueError, match=r"`gates` of .* must come with `plan`"):
        experts(tokens, plan=plan)
    with pytest.raises(ValueError, match=r"`plan` of .* must come with `gates`"):
        experts(tokens, gates=result.gates)
