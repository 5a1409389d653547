"""A layer notices that an optimizer step has ended, whatever loop runs it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe.layers.step_clock import StepClock


@keras.saving.register_keras_serializable(package="keras_moe_tests")
class Clocked(keras.layers.Layer):
    """Asks twice in a call, and adds up how often a step had ended."""

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel", shape=(input_shape[-1], 2), initializer="ones"
        )
        self.clock = StepClock(self, self.kernel)
        self.seen = self.add_weight(
            name="seen", shape=(2,), initializer="zeros", trainable=False
        )

    def call(self, inputs, training=None):
        if training:
            ticks = [self.clock.tick(inputs) for _ in range(2)]
            ended = tf.stack([tick.ended for tick in ticks])
            self.seen.assign(self.seen + tf.cast(ended, tf.float32))
        return tf.matmul(inputs, self.kernel)


def compiled(accumulated=None, **options):
    layer = Clocked(name="clocked")
    model = keras.Sequential([keras.Input((3,)), layer])
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulated)
    model.compile(optimizer, "mse", **options)
    return model, layer


def batches(number):
    x = np.random.default_rng(0).normal(size=(2 * number, 3)).astype("float32")
    return x, x[:, :2], 2


def assert_ended(layer, number):
    """As often as said, noticed by the first of the two calls."""
    assert int(layer.clock.num_steps) == number
    assert layer.seen.numpy().tolist() == [number, 0]


# Of 6 calls the first sees no step ended; of two accumulated ones only each second.
@pytest.mark.parametrize(
    ("options", "ended"),
    [
        ({}, 5),
        ({"accumulated": 2}, 2),
        ({"steps_per_execution": 3}, 5),
        ({"jit_compile": True}, 5),
        ({"run_eagerly": True}, 5),
    ],
    ids=str,
)
def test_fit(options, ended):
    model, layer = compiled(**options)
    x, y, size = batches(6)
    model.fit(x, y, batch_size=size, verbose=0)
    assert_ended(layer, ended)


def test_a_loop_of_ones_own():
    _, layer = compiled()
    optimizer = keras.optimizers.SGD(0.1)
    x, y, _ = batches(4)

    @tf.function
    def steps():
        for _ in tf.range(4):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((layer(x, training=True) - y) ** 2)
            weights = layer.trainable_variables
            optimizer.apply(tape.gradient(loss, weights), weights)

    optimizer.build(layer.trainable_variables)
    steps()
    assert_ended(layer, 3)


def test_if_the_weight_is_not_trained_every_call_is_a_step():
    _, layer = compiled()
    layer.kernel.trainable = False
    x, _, _ = batches(1)
    for _ in range(3):
        layer(x, training=True)
    assert int(layer.clock.num_steps) == 2 * 3 - 1


@pytest.mark.parametrize("form", ["model.keras", "checkpoint"])
def test_files_hold_the_state(form, tmp_path):
    # Written in the middle of two calls whose gradients are accumulated, or not.
    x, y, size = batches(3)
    model, layer = compiled(accumulated=2)
    model.fit(x, y, batch_size=size, verbose=0, shuffle=False)
    path = str(tmp_path / form)
    if form == "checkpoint":
        tf.train.Checkpoint(model=model).write(path)
        again, _ = compiled()
        tf.train.Checkpoint(model=again).read(path).expect_partial()
    else:
        model.save(path)
        again = keras.saving.load_model(path)
    copy = again.get_layer("clocked")
    for each in (layer, copy):
        assert_ended(each, 1)
        each(x, training=True)
        assert_ended(each, 1)
        each.kernel.assign_add(tf.ones_like(each.kernel))
        each(x, training=True)
        assert_ended(each, 2)


def test_evaluation_and_prediction_write_nothing():
    model, layer = compiled()
    x, y, size = batches(2)
    model.fit(x, y, batch_size=size, verbose=0)
    before = [variable.numpy() for variable in layer.variables]
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    for value, variable in zip(before, layer.variables, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_the_end_of_a_data_set_of_unknown_length_is_no_step():
    # Keras asks for a batch more and runs what does not depend on it.
    model, layer = compiled()
    x, y, size = batches(4)
    parts = tf.data.Dataset.from_tensor_slices((x, y)).batch(size, drop_remainder=True)
    unknown = parts.filter(lambda x, y: True)
    model.fit(unknown, epochs=2, verbose=0)
    assert_ended(layer, 7)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_bit_of_the_weight_counts(dtype):
    layer = keras.layers.Layer()
    weight = layer.add_weight(
        name="w", shape=(3, 4), initializer="glorot_normal", dtype=dtype
    )
    clock = StepClock(layer, weight)
    before = weight.numpy()
    noted = set()
    for place in [None, *np.ndindex(3, 4)]:
        value = before.copy()
        if place is not None:
            value[place] = np.nextafter(value[place], np.inf, dtype=dtype)
        weight.assign(value)
        tick, again = (clock.tick(tf.zeros(())) for _ in range(2))
        assert (bool(tick.begins), bool(tick.ended)) == (True, place is not None)
        assert not again.begins
        assert not again.ended
        noted.add(int(layer.weights[1]))
    assert len(noted) == 13
