"""The loss of an evaluation is the task's; who wants the balance in it asks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional as F
from keras_moe import layers

D, TIME, E = 4, 3, 12


@keras.saving.register_keras_serializable(package="tests")
class WithLoss(layers.TopKGating):
    """A gate with a loss of its own, in evaluation too."""

    def call(self, inputs, mask=None, training=None):
        result = super().call(inputs, mask=mask, training=training)
        return result._replace(auxiliary_losses=(tf.constant(7.0),))


def experts():
    return layers.FeedForwardExperts(E, 5)


KINDS = {
    "flat": lambda **options: layers.MoE(
        experts(), layers.NoisyTopKGating(k=2), **options
    ),
    "own loss": lambda **options: layers.MoE(experts(), WithLoss(k=2), **options),
    "balanced": lambda **options: layers.MoE(
        experts(), layers.BalancedGating(k=2), **options
    ),
    "capacity": lambda **options: layers.MoE(
        experts(), layers.NoisyTopKGating(k=2), capacity_factor=1.0, **options
    ),
    "groups": lambda **options: layers.HierarchicalMoE(experts(), 3, **options),
    "groups with a loss": lambda **options: layers.HierarchicalMoE(
        experts(), 3, primary_gating=WithLoss(k=2), **options
    ),
    "recurrent": lambda **options: layers.MoELSTM(
        D, E, return_sequences=True, **options
    ),
}


@pytest.fixture
def x(rng):
    return rng.normal(size=(8, TIME, D)).astype("float32")


def number_of_losses(layer, x, **options):
    layer(x, **options)
    return len(layer.losses)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_losses_come_in_training_and_elsewhere_if_asked_for(make, x):
    layer = make()
    assert number_of_losses(layer, x, training=True) >= 2
    for options in ({"training": False}, {"training": None}, {}):
        assert number_of_losses(layer, x, **options) == 0, options
    asked = make(losses_in_evaluation=True)
    # Thresholds are trained, and counts give no load loss by default.
    least = 1 if isinstance(asked.gating, layers.BalancedGating) else 2
    assert number_of_losses(asked, x, training=False) >= least
    assert asked.get_config()["losses_in_evaluation"] is True
    assert type(asked).from_config(asked.get_config()).losses_in_evaluation
    # A model that was saved before the argument was there.
    config = asked.get_config()
    del config["losses_in_evaluation"]
    old = type(asked).from_config(config)
    assert number_of_losses(old, x, training=False) == 0


@pytest.mark.parametrize(
    ("kind", "run_eagerly"), [("flat", False), *((kind, True) for kind in KINDS)]
)
def test_the_loss_of_an_evaluation_is_the_task_and_regularizers(kind, x, run_eagerly):
    inputs = keras.Input((TIME, D))
    outputs = keras.layers.Dense(D, kernel_regularizer=keras.regularizers.L2(0.5))(
        KINDS[kind]()(inputs)
    )
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse", metrics=["mse"], run_eagerly=run_eagerly)
    history = model.fit(x, x, validation_data=(x, x), verbose=0).history
    (penalty,) = (float(loss) for loss in model.losses)
    assert penalty > 0.01
    assert history["val_loss"][0] == pytest.approx(
        history["val_mse"][0] + penalty, rel=1e-5
    )
    # Of training: balance as well.
    assert history["loss"][0] > history["mse"][0] + penalty + 1e-3


def test_losses_of_an_own_evaluation_are_those_of_the_true_counts(x):
    layer = KINDS["flat"](losses_in_evaluation=True)

    @tf.function
    def losses_of(x):
        layer(x, training=False)
        return layer.losses

    found = losses_of(x)
    statistics = layer.route(x).statistics
    np.testing.assert_allclose(
        found,
        [
            F.importance_loss(statistics.importance, 0.1),
            F.load_loss(statistics.load, 0.1),
        ],
        rtol=1e-6,
    )


def test_what_comes_before_a_frozen_mixture_still_balances(x):
    layer = KINDS["flat"]()
    layer.build(x.shape)
    layer.gating.gate_kernel.assign(np.eye(D, E))
    layer.trainable = False
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        layer(inputs, training=True)
        total = tf.add_n(layer.losses)
    assert np.abs(tape.gradient(total, inputs)).max() > 0.0
    assert layer.trainable_variables == []
