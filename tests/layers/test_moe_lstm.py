import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe
import keras_moe.functional as F
from keras_moe.layers import MoELSTM, MoELSTMCell, NoisyTopKGating

BATCH, TIME, FEATURES, UNITS = 3, 6, 4, 5


@pytest.fixture
def x(rng):
    return rng.normal(size=(BATCH, TIME, FEATURES)).astype("float32")


@pytest.fixture
def mask(rng):
    mask = rng.random((BATCH, TIME)) < 0.6
    mask[0, :2] = False  # begins with padding
    mask[1, -2:] = False  # ends with it
    return mask


def gate(k=2, **kwargs):
    return NoisyTopKGating(
        k=k,
        gate_initializer="glorot_normal",
        noise_initializer="glorot_normal",
        **kwargs,
    )


def pair(x, **kwargs):
    """A Keras LSTM and a mixture of one expert with the same weights."""
    lstm = keras.layers.LSTM(UNITS, bias_initializer="glorot_uniform", **kwargs)
    mixture = MoELSTM(UNITS, 1, NoisyTopKGating(k=1), **kwargs)
    lstm(x), mixture(x)
    kernel, recurrent_kernel, bias = lstm.get_weights()
    mixture.cell.kernel.assign(np.concatenate([kernel, recurrent_kernel])[np.newaxis])
    mixture.cell.bias.assign(bias)
    return lstm, mixture


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("go_backwards", [False, True])
@pytest.mark.parametrize("return_sequences", [False, True])
def test_one_expert_is_the_keras_lstm(x, mask, masked, go_backwards, return_sequences):
    options = {"go_backwards": go_backwards, "return_sequences": return_sequences}
    lstm, mixture = pair(x, return_state=True, **options)
    mask = mask if masked else None
    values, gradients = [], []
    for layer in (lstm, mixture):
        inputs = tf.constant(x)
        states = [tf.ones((BATCH, UNITS)) * 0.3, tf.ones((BATCH, UNITS)) * -0.2]
        weights = [v.value for v in layer.trainable_variables if "gat" not in v.path]
        with tf.GradientTape() as tape:
            tape.watch([inputs, *states])
            results = layer(inputs, initial_state=states, mask=mask, training=True)
            total = sum(tf.reduce_sum(tf.sin(r)) for r in results)
        d_inputs, *d_states_weights = tape.gradient(total, [inputs, *states, *weights])
        d_h, d_c, *d_weights = d_states_weights
        if layer is lstm:
            d_weights = [np.concatenate(d_weights[:2])[np.newaxis], d_weights[2]]
        values.append(results)
        gradients.append([d_inputs, d_h, d_c, *d_weights])
    for wanted, got in zip(values[0], values[1], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    for wanted, got in zip(gradients[0], gradients[1], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_stateful_goes_on_where_the_last_batch_ended(x):
    lstm, mixture = pair(x, stateful=True)
    for layer in (lstm, mixture):
        layer.reset_state()
    for _ in range(3):
        np.testing.assert_allclose(mixture(x), lstm(x), atol=1e-5)
    mixture.reset_state()
    first = mixture(x)
    assert not np.allclose(first, mixture(x))


def test_losses_are_those_of_the_same_gate_outside_the_loop(x, mask):
    layer = MoELSTM(UNITS, 8, gate(), return_sequences=True, load_loss_weight=0.3)
    layer(x)
    layer.balance.reset_state()
    noise = layer.gating.draw_noise(TIME * BATCH)
    layer.gating.draw_noise = lambda num_tokens: noise
    for m in (None, mask):
        outputs = layer(x, mask=m, training=True).numpy()
        states = np.concatenate([np.zeros_like(outputs[:, :1]), outputs[:, :-1]], 1)
        u = np.concatenate([x, states], axis=-1).transpose(1, 0, 2)
        result = layer.gating(
            u.reshape(TIME * BATCH, -1),
            mask=None if m is None else tf.constant(m.T.reshape(-1)),
            training=True,
            noise=noise,
        )
        expected = [
            F.importance_loss(result.statistics.importance, 0.1),
            F.load_loss(result.statistics.load, 0.3),
        ]
        np.testing.assert_allclose(layer.losses, expected, rtol=1e-5)
        np.testing.assert_array_equal(
            layer.balance.counts(), tf.cast(result.statistics.counts, "float64")
        )
        layer.balance.reset_state()


def test_padding_changes_nothing(x):
    layer = MoELSTM(UNITS, 8, gate(), return_state=True, losses_in_evaluation=True)
    outputs = layer(x)
    losses = [float(loss) for loss in layer.losses]
    padded = np.concatenate([x, np.full((BATCH, 3, FEATURES), 7.0, "float32")], axis=1)
    mask = np.arange(TIME + 3) < np.full((BATCH, 1), TIME)
    for wanted, got in zip(outputs, layer(padded, mask=mask), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    np.testing.assert_allclose(layer.losses, losses, rtol=1e-6)


def test_noise_differs_between_calls_and_steps_but_not_at_inference(x):
    layer = MoELSTM(UNITS, 8, gate(seed=1), return_sequences=True)
    same = np.repeat(x[:, :1], TIME, axis=1)
    assert not np.allclose(layer(same, training=True), layer(same, training=True))
    np.testing.assert_array_equal(layer(same), layer(same))
    noise = layer._noise(tf.zeros((TIME, BATCH, FEATURES)), True).numpy()
    assert noise.shape == (TIME, BATCH, 8)
    assert len(np.unique(noise)) == noise.size


@pytest.mark.slow
@pytest.mark.exhaustive
def test_segments_train_to_the_same_weights(x):
    results = []
    for segment_length in (None, 4):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((None, FEATURES))
        masked = keras.layers.Masking()(inputs)
        layer = MoELSTM(UNITS, 8, gate(seed=5), segment_length=segment_length)
        model = keras.Model(inputs, layer(masked))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(x, np.ones((BATCH, UNITS)), epochs=3, verbose=0, shuffle=False)
        results.append(model.get_weights())
    for kept, recomputed in zip(*results, strict=True):
        np.testing.assert_allclose(recomputed, kept, atol=1e-6)


@pytest.mark.slow
def test_inside_bidirectional_and_fit_with_logs(x, tmp_path):
    inputs = keras.Input((None, FEATURES))
    masked = keras.layers.Masking()(inputs)
    layer = MoELSTM(UNITS, 4, gate(), return_sequences=True)
    outputs = keras.layers.Bidirectional(layer)(masked)
    model = keras.Model(inputs, keras.layers.Dense(2)(outputs))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    y = np.cumsum(x[..., :2], axis=1)
    history = model.fit(x, y, epochs=30, verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert sum("load_cv" in name for name in history) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))


def test_an_own_gate_is_fed_its_noise_and_trains(x):
    @keras.saving.register_keras_serializable(package="test")
    class Coin(keras.layers.Layer):
        """Picks one expert by the sign of its noise."""

        num_experts = 2

        def build(self, shape):
            self.scale = self.add_weight(shape=())

        def draw_noise(self, num_tokens):
            return tf.ones((num_tokens, 1))

        def call(self, inputs, mask=None, training=None, noise=None):
            flip = tf.zeros_like(inputs[:, :1]) if noise is None else noise
            experts = tf.cast(flip > 0, tf.int32)
            return F.make_gating_result(
                tf.ones_like(flip) * (1 + self.scale), experts, 2, mask=mask
            )

    layer = MoELSTM(UNITS, 2, Coin())
    layer(x)
    for training, expert in (False, 0), (True, 1):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(layer(x, training=training))
        kernel, scale = layer.cell.kernel.value, layer.gating.scale.value
        d_kernel, d_scale = tape.gradient(total, [kernel, scale])
        assert np.abs(d_kernel[expert]).max() > 0
        assert float(d_scale) != 0
        np.testing.assert_array_equal(d_kernel[1 - expert], 0)


def test_the_cell_takes_its_place_in_a_keras_rnn(x):
    layer = MoELSTM(UNITS, 4, gate(), return_sequences=True)
    expected = layer(x)
    rnn = keras.layers.RNN(layer.cell, return_sequences=True)
    np.testing.assert_allclose(rnn(x), expected, atol=1e-6)


def test_a_frozen_gate_gets_no_gradient_and_still_routes(x):
    layer = MoELSTM(UNITS, 4, gate())
    layer(x)
    layer.gating.trainable = False
    assert len(layer.trainable_variables) == 2
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(x, training=True))
    assert None not in tape.gradient(
        total, [v.value for v in layer.trainable_variables]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": 0}, "`units`.*Received.*0"),
        ({"num_experts": -1}, "`num_experts`.*Received.*-1"),
        ({"segment_length": 0}, "`segment_length`.*Received.*0"),
        ({"load_loss_weight": -1.0}, "`load_loss_weight`.*-1"),
        ({"unroll": True}, "`unroll`.*Received"),
        ({"gating": NoisyTopKGating(k=9)}, "k=9.*num_experts=8|num_experts.*8.*9"),
        ({"gating": NoisyTopKGating(2, 5)}, "gating.num_experts=5"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoELSTM(**{"units": 4, "num_experts": 8, **arguments})


def test_balanced_gating_is_refused_with_a_reason(x):
    gating = keras_moe.layers.BalancedGating(k=2, gate_initializer="glorot_normal")
    layer = MoELSTM(UNITS, 4, gating)
    with pytest.raises(ValueError, match="same number of experts"):
        layer(x, training=True)


def test_integer_inputs_are_refused():
    with pytest.raises(ValueError, match="floating"):
        MoELSTM(UNITS, 4, gate())(np.ones((2, 3, 4), "int32"))


def test_cell_config_round_trip():
    cell = MoELSTMCell(3, 4, gate(seed=2), unit_forget_bias=False)
    assert MoELSTMCell.from_config(cell.get_config()).get_config() == cell.get_config()
