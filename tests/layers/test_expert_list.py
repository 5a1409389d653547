import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe
from keras_moe import layers

D = 8


def kinds():
    """Experts of different kinds, with inputs and outputs of 8 features."""
    inner = layers.MoE(layers.FeedForwardExperts(3, 4), layers.NoisyTopKGating(k=2))
    return [
        keras.layers.Dense(D),
        keras.Sequential(
            [
                keras.layers.Reshape((4, 2)),
                keras.layers.Conv1D(3, 3, padding="same", activation="relu"),
                keras.layers.Flatten(),
                keras.layers.Dense(D),
            ]
        ),
        keras.Sequential([keras.layers.Reshape((4, 2)), keras.layers.LSTM(D)]),
        inner,
    ]


def test_experts_of_different_kinds_train_save_and_reload(rng, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((5, D)),
            layers.MoE(layers.ExpertList(kinds()), layers.NoisyTopKGating(k=2)),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = rng.normal(size=(16, 5, D)).astype("float32")
    before = [w.copy() for w in model.get_weights()]
    history = model.fit(x, np.tanh(x), epochs=5, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    changed = [
        np.abs(new - old).max() > 0
        for new, old in zip(model.get_weights(), before, strict=True)
    ]
    assert all(changed)
    path = tmp_path / "model.keras"
    model.save(path)
    np.testing.assert_array_equal(keras.saving.load_model(path)(x), model(x))


def test_equals_feed_forward_experts_with_the_same_weights(rng):
    stacked = layers.FeedForwardExperts(3, 6)
    stacked.build((None, D))
    singles = []
    for e in range(3):
        single = keras.Sequential(
            [
                keras.layers.Dense(6, "relu", use_bias=False),
                keras.layers.Dense(D, use_bias=False),
            ]
        )
        single.build((None, D))
        single.set_weights([kernel.numpy()[e] for kernel in stacked.kernels])
        singles.append(single)
    listed = layers.ExpertList(singles)
    rows = rng.normal(size=(7, D)).astype("float32")
    counts = np.array([4, 0, 3])
    np.testing.assert_allclose(
        listed(rows, counts=counts), stacked(rows, counts=counts), atol=1e-6
    )
    slots = rng.normal(size=(3, 4, D)).astype("float32")
    np.testing.assert_allclose(listed(slots), stacked(slots), atol=1e-6)


class Recorder(keras.layers.Layer):
    """Remembers what it was called with."""

    def call(self, inputs, training=None):
        self.seen = inputs
        self.training = training
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape


def test_a_layer_sees_only_its_own_tokens_and_training_is_passed_on():
    experts = [Recorder(), Recorder(), Recorder()]
    listed = layers.ExpertList(experts)
    rows = np.arange(10.0, dtype="float32").reshape(5, 2)
    listed(rows, counts=np.array([2, 3, 0]), training=True)
    np.testing.assert_array_equal(experts[0].seen, rows[:2])
    np.testing.assert_array_equal(experts[1].seen, rows[2:])
    # An expert without tokens sees a row of zeros, whose answer is dropped.
    np.testing.assert_array_equal(experts[2].seen, [[0.0, 0.0]])
    assert [e.training for e in experts] == [True] * 3


def test_dropout_of_an_expert_acts_in_training_only(rng):
    listed = layers.ExpertList([keras.layers.Dropout(0.5), keras.layers.Dropout(0.5)])
    rows = np.ones((6, D), "float32")
    counts = np.array([3, 3])
    np.testing.assert_array_equal(listed(rows, counts=counts, training=False), rows)
    dropped = listed(rows, counts=counts, training=True).numpy()
    assert set(np.unique(dropped)) == {0.0, 2.0}


def test_losses_of_experts_are_collected(rng):
    expert = keras.layers.Dense(D, kernel_regularizer=keras.regularizers.L2(0.1))
    layer = layers.MoE(
        layers.ExpertList([expert, keras.layers.Dense(D)]),
        layers.TopKGating(k=1, normalization="all"),
        importance_loss_weight=0.0,
        load_loss_weight=0.0,
    )
    layer(rng.normal(size=(4, D)).astype("float32"))
    (loss,) = layer.losses
    assert float(loss) == pytest.approx(
        0.1 * float(tf.reduce_sum(expert.kernel**2)), rel=1e-5
    )


def test_bad_experts_are_refused():
    with pytest.raises(ValueError, match=r"experts=\[\]"):
        layers.ExpertList([])
    with pytest.raises(ValueError, match="must be Keras layers. Received: 'dense'"):
        layers.ExpertList(["dense"])
    twice = keras.layers.Dense(2, name="twice")
    with pytest.raises(ValueError, match="'twice', 'twice'"):
        layers.ExpertList([twice, twice])
    differing = layers.ExpertList(
        [keras.layers.Dense(2, name="a"), keras.layers.Dense(3, name="b")]
    )
    with pytest.raises(ValueError, match=r"a: \(None, 2\), b: \(None, 3\)"):
        differing.build((None, D))
    with pytest.raises(ValueError, match=r"\(None, 4, 2\)"):
        layers.ExpertList([keras.layers.Reshape((4, 2))]).build((None, D))
    with pytest.raises(ValueError, match="counts=None"):
        layers.ExpertList([keras.layers.Dense(2)])(np.ones((2, D), "float32"))


@pytest.mark.parametrize("capacity_factor", [None, 4.0])
@pytest.mark.parametrize("wrapped", [False, True])
def test_batch_statistics_are_those_of_the_real_rows(rng, capacity_factor, wrapped):
    # Expert 1 gets nothing: one dummy row, or empty slots only.
    norms = [keras.layers.BatchNormalization(momentum=0.0) for _ in range(2)]
    experts = norms
    if wrapped:
        experts = [keras.Sequential([layer]) for layer in norms]
    gating = layers.TopKGating(k=1, normalization="all")
    layer = layers.MoE(
        layers.ExpertList(experts), gating, capacity_factor=capacity_factor
    )
    x = (rng.normal(size=(6, 3)) + 5.0).astype("float32")
    layer.build(x.shape)
    gating.gate_kernel.assign([[1.0, -1.0]] * 3)
    layer(x, training=True)
    np.testing.assert_allclose(norms[0].moving_mean, x.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(norms[0].moving_variance, x.var(axis=0), rtol=1e-3)
    np.testing.assert_allclose(norms[1].moving_mean, 0.0, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [12, 0])
@pytest.mark.parametrize("masked", [False, True])
def test_experts_are_the_same_where_a_graph_is_for_gpus(rng, masked, num_tokens):
    experts = [keras.layers.Dense(D, "tanh") for _ in range(4)]
    gating = layers.TopKGating(k=2, use_bias=True)
    layer = layers.MoE(layers.ExpertList(experts), gating)
    layer.build((None, D))
    gating.gate_bias.assign([0.0, 0.0, 0.0, -99.0])  # the last one gets no row
    x = tf.constant(rng.normal(size=(num_tokens, D)), tf.float32)
    mask = tf.constant(rng.random(num_tokens) < 0.6) if masked else None
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function(input_signature=[tf.TensorSpec((None, D))], autograph=False)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, mask=mask, training=True)
            total = tf.reduce_sum(tf.sin(outputs)) + sum(layer.losses)
        gradients = tape.gradient(total, [x, *weights], unconnected_gradients="zero")
        return outputs, gradients

    expected = tf.nest.flatten(step(x))
    with keras_moe.serving.gpu_operations():
        found = tf.nest.flatten(
            tf.function(step.python_function, step.input_signature, autograph=False)(x)
        )
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6)
