"""The balance of layers in loops that are not Keras'."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers

D, E, N, K = 4, 6, 10, 2


@pytest.fixture
def x(rng):
    return rng.normal(size=(N, D)).astype("float32")


def make(kind):
    gate = layers.TopKGating(k=K)
    if kind == "flat":
        return layers.MoE(layers.FeedForwardExperts(E, 3), gate, name="moe")
    return layers.HierarchicalMoE(
        layers.FeedForwardExperts(E, 3), 3, k=(1, K), name="moe"
    )


def model_of(layer):
    return keras.Sequential([keras.Input((D,)), layer])


@pytest.mark.parametrize("kind", ["flat", "groups"])
def test_training_in_a_function_is_counted(x, kind):
    layer = make(kind)
    model = model_of(layer)
    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(model(x, training=True)) + sum(model.losses)
        weights = [v.value for v in model.trainable_variables]
        optimizer.apply_gradients(
            zip(tape.gradient(total, weights), model.trainable_variables, strict=True)
        )

    for number in (1, 2):
        step(x)
        assert float(tf.reduce_sum(layer.balance.counts())) == number * N * K
    found = layer.balance.result()
    assert float(found["moe_max_over_mean_load"]) >= 1.0
    layer.balance.reset_state()
    step(x)
    assert float(tf.reduce_sum(layer.balance.counts())) == N * K


def test_an_evaluation_that_does_not_ask_is_warned_of(x):
    layer = make("flat")
    model = model_of(layer)

    @tf.function
    def silent(x):
        return model(x, training=False)

    @tf.function
    def asking(x):
        return model(x, training=False), layer.balance.result()

    silent(x)
    with pytest.warns(UserWarning, match=r"moe: nothing is counted.*tf\.function"):
        layer.balance.result()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, found = asking(x)
        assert float(found["moe_max_over_mean_load"]) >= 1.0
        assert float(tf.reduce_sum(layer.balance.counts())) == N * K
        model.predict(x, verbose=0)  # is not counted, and nobody is asked to care
        assert float(tf.reduce_sum(layer.balance.counts())) == N * K
        silent(x)
        layer(x)  # eagerly
        assert float(tf.reduce_sum(layer.balance.counts())) == 2 * N * K


def test_an_exported_model_writes_nothing(x):
    layer = make("flat")
    model = model_of(layer)
    graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(
        tf.TensorSpec((None, D))
    )
    kinds = {operation.type for operation in graph.graph.get_operations()}
    assert not any(kind.startswith("Assign") for kind in kinds)
    with pytest.warns(UserWarning, match="nothing is counted"):
        np.testing.assert_array_equal(layer.balance.totals()["counts"], np.zeros(E))
