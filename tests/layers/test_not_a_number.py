"""A token of NaN spoils its own row, and nothing else fails or changes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers

D, N, BAD = 6, 9, 4


def mixture(gate, num_experts=4, **options):
    experts = layers.FeedForwardExperts(num_experts, 5)
    return layers.MoE(experts, gate, **options)


def noisy(k=2):
    return layers.NoisyTopKGating(k=k, gate_initializer="glorot_uniform", seed=1)


GATES = {
    "softmax": lambda: mixture(layers.SoftmaxGating(gate_initializer="glorot_normal")),
    "softmax of many": lambda: mixture(layers.SoftmaxGating(), 300),
    "top-k": lambda: mixture(layers.TopKGating(k=2)),
    "top-1 of all": lambda: mixture(layers.TopKGating(k=1, normalization="all")),
    "noisy": lambda: mixture(noisy()),
    "noisy, blocks": lambda: mixture(noisy(), 300),
    "noisy, capacity": lambda: mixture(
        noisy(), capacity_factor=4.0, evaluation_capacity_factor=4.0
    ),
    "every expert": lambda: mixture(layers.TopKGating(k=4)),
    "balanced": lambda: mixture(layers.BalancedGating(k=2)),
    "loss-free": lambda: mixture(layers.LossFreeGating(k=2)),
    "second by threshold": lambda: mixture(
        layers.GShardGating(second_policy="threshold", second_threshold=0.4)
    ),
    "groups": lambda: layers.HierarchicalMoE(
        layers.FeedForwardExperts(12, 5), 4, primary_gating=noisy()
    ),
    "groups, balanced": lambda: layers.HierarchicalMoE(
        layers.FeedForwardExperts(12, 5), 4, primary_gating=layers.BalancedGating(k=2)
    ),
}


@pytest.fixture
def x(rng):
    return rng.normal(size=(N, D)).astype("float32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_other_rows_are_what_they_would_be(kind, training, value, x):
    layer = GATES[kind]()
    layer(x)
    bad = x.copy()
    bad[BAD] = value
    states = [v.value.numpy() for v in layer.non_trainable_variables]

    def run(x):
        for variable, state in zip(layer.non_trainable_variables, states, strict=True):
            variable.assign(state)
        return layer(x, training=training).numpy()

    good, found = run(x), run(bad)
    assert not np.isfinite(found[BAD]).all()
    others = np.arange(N) != BAD
    assert np.isfinite(found[others]).all()
    if not ((training and "balanced" in kind) or (kind == "groups" and training)):
        # There others take a place, or a row of noise, that was the token's.
        np.testing.assert_allclose(found[others], good[others], atol=1e-5)


def test_a_balanced_gate_gives_the_places_to_real_tokens(x):
    layer = mixture(layers.BalancedGating(k=2))
    layer(x)
    bad = x.copy()
    bad[BAD] = np.nan
    layer.balance.reset_state()
    layer(bad, training=True)
    # m = 2 * 9 / 4 = 4.5, rounded up: 5 each, and the token of NaN at the first.
    assert layer.balance.counts().numpy().tolist() == [6, 5, 5, 5]


@pytest.mark.parametrize("training", [False, True])
def test_a_sequence_of_a_recurrent_mixture(rng, training):
    x = rng.normal(size=(3, 5, D)).astype("float32")
    layer = layers.MoELSTM(3, 4, noisy(), return_sequences=True)
    layer(x)
    x[1, 2] = np.nan
    found = layer(x, training=training).numpy()
    assert np.isfinite(found[[0, 2]]).all()
    assert np.isfinite(found[1, :2]).all()
    assert np.isnan(found[1, 2:]).all()


def test_padding_may_hold_anything(x):
    for capacity in (None, 2.0):
        layer = mixture(noisy(), capacity_factor=capacity)
        x[BAD] = np.nan
        mask = np.arange(N) != BAD
        outputs = layer(x, mask=mask, training=True).numpy()
        np.testing.assert_array_equal(outputs[BAD], 0.0)
        assert np.isfinite(outputs).all()
        assert np.isfinite(layer.losses).all()


def test_a_loss_scale_skips_the_step(x):
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential(
        [keras.Input((D,)), mixture(layers.SoftmaxGating()), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), "mse")
    before = model.get_weights()
    bad = x.copy()
    bad[BAD] = np.nan
    y = np.zeros((N, 1), "float32")
    model.fit(bad, y, batch_size=N, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    model.fit(x, y, batch_size=N, verbose=0)
    assert any(
        np.any(old != new) for old, new in zip(before, model.get_weights(), strict=True)
    )
    assert all(np.isfinite(w).all() for w in tf.nest.flatten(model.get_weights()))
