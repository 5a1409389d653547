"""A step waits for the readers of its weight, so that it writes it where it lies."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import optimizers
from keras_moe.optimizers.readers import Readers
from tests.distribution import children
from tests.distribution.readers_child import product


def product_of_parts(x, w):
    """The same, expert by expert."""
    parts = zip(*(tf.split(each, x.shape[0]) for each in (x, w)), strict=True)
    return tf.concat([product(*own) for own in parts], axis=0)


def address(variable):
    return variable.value.read_value()._numpy().ctypes.data


@pytest.mark.parametrize(
    ("shape", "factored", "product"),
    [
        pytest.param((8, 512, 256), ["w"], product, id="blocks"),
        pytest.param((2, 1024, 512), ["w"], product_of_parts, id="parts"),
        pytest.param((64, 256), ["w"], product, id="matrix"),
        pytest.param((64, 256), [], product, id="adam"),
    ],
)
def test_weights_stay_where_they_are_and_end_as_in_eager_mode(shape, factored, product):
    rng = np.random.default_rng(0)
    start = [rng.normal(size=s).astype("float32") for s in (shape[-2:-1], shape)]
    x = tf.constant(rng.normal(size=(*shape[:-2], 4, shape[-2])), "float32")

    def trained(decorate, steps=3):
        scale, w = (
            keras.Variable(value, name=name)
            for name, value in zip(("scale", "w"), start, strict=True)
        )
        optimizer = optimizers.FactoredAdam(0.1, factored=factored)
        optimizer.build([scale, w])

        @decorate
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.square(product(x * scale.value, w.value)))
            gradients = tape.gradient(loss, [scale.value, w.value])
            optimizer.apply(gradients, [scale, w])
            return loss

        places = []
        for _ in range(steps):
            step(x)
            places.append(address(w))
        assert len(set(places)) == 1 or decorate is not tf.function
        return [scale.numpy(), w.numpy()]

    for here, expected, old in zip(
        trained(tf.function), trained(lambda f: f), start, strict=True
    ):
        np.testing.assert_allclose(here, expected, rtol=1e-5, atol=1e-6)
        assert np.max(np.abs(here - old)) > 0.1


def test_only_operations_that_gradients_need_are_waited_for():
    first, second, aside = (tf.Variable(tf.ones((3, 3))) for _ in range(3))
    parted = tf.Variable(tf.ones((2, 3, 3)))
    found = {}

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            hidden = tf.matmul(x, tf.identity(first), name="first")
            tf.matmul(hidden, second, name="nobody_needs_it")
            for index, part in enumerate(tf.split(parted, 2)):
                hidden = tf.matmul(hidden, part[0], name=f"part_{index}")
            loss = tf.reduce_sum(tf.square(tf.matmul(hidden, second, name="second")))
        tf.matmul(x, aside, name="aside")
        readers = Readers([*tape.gradient(loss, [first, second, parted]), None])
        for name, variable in (
            ("first", first),
            ("second", second),
            ("aside", aside),
            ("parted", parted),
        ):
            found[name] = {operation.name for operation in readers.of(variable)}
        return loss

    step(tf.ones((2, 3)))
    assert "first" in found["first"]
    assert "second" in found["second"]
    (other,) = found["second"] - {"second"}
    assert "MatMul" in other  # of the gradient in `hidden`
    assert found["aside"] == set()
    assert {"part_0", "part_1"} <= found["parted"]  # which lie in its memory


def test_nothing_is_waited_for_in_eager_mode():
    variable = tf.Variable(tf.ones((3, 3)))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.matmul(variable, variable))
    assert Readers([tape.gradient(loss, variable)]).of(variable) == []


@pytest.mark.slow
def test_on_replicas_each_part_waits_for_its_own_readers():
    for found in children.run("readers_child", {}).values():
        assert found["waits"] == [True, True]
        assert len(found["places"]) == 2
        assert all(len(set(places)) == 1 for places in found["places"])
        assert found["apart"] < 1e-3  # after four steps of about 0.1
