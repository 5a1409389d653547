"""Products of the rows of one expert with its kernel, against NumPy in float64."""

import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import runtime
from keras_moe.functional import expert_products

D, H = 256, 512
SHAPES = [(1, D, H), (1, 512, H), (1, 4, 6), (3, 4, 6), (D, H), (512, H), (4, 6)]


@pytest.fixture(params=[False, True], ids=["eigen", "onednn"])
def onednn(request, monkeypatch):
    monkeypatch.setattr(runtime, "uses_onednn", lambda: request.param)
    return request.param


def kinds_of(function, *arguments):
    graph = tf.function(function).get_concrete_function(*arguments).graph
    return [op.type for op in graph.get_operations()]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 5, 256, 257])
def test_value_and_gradients(rng, onednn, rows, shape, traced):
    *e, d, h = shape
    x, kernel, weights = (
        rng.normal(size=each) for each in ((*e, rows, d), shape, (*e, rows, h))
    )

    def run(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = expert_products.times(x, kernel)
            total = tf.reduce_sum(tf.square(y) * tf.constant(weights, tf.float32))
        return [y, *tape.gradient(total, [x, kernel])]

    if traced:
        signature = [tf.TensorSpec((*e, None, d)), tf.TensorSpec(shape)]
        run = tf.function(run, input_signature=signature)
    found = run(tf.constant(x, tf.float32), tf.constant(kernel, tf.float32))
    y = x @ kernel
    dy = 2 * weights * y
    expected = [y, dy @ np.swapaxes(kernel, -1, -2), np.swapaxes(x, -1, -2) @ dy]
    for here, there in zip(found, expected, strict=True):
        scale = np.abs(there).max(initial=1.0)
        np.testing.assert_allclose(here / scale, there / scale, atol=2e-6)


def test_second_derivatives(rng, onednn):
    x, kernel, direction = (
        tf.constant(rng.normal(size=shape), tf.float32)
        for shape in ((1, 3, D), (1, D, H), (1, 3, D))
    )

    def second(times):
        with tf.GradientTape() as outer:
            outer.watch([x, kernel])
            with tf.GradientTape() as tape:
                tape.watch(x)
                total = tf.reduce_sum(tf.tanh(0.01 * times(x, kernel)))
            along = tf.reduce_sum(tape.gradient(total, x) * direction)
        return outer.gradient(along, [x, kernel])

    for here, there in zip(
        second(expert_products.times), second(tf.matmul), strict=True
    ):
        assert np.abs(there).max() > 1e-4
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-6)


def products_of_a_step(d, h):
    """Batched and plain products of a step of two experts with two kernels each."""
    plan = F.make_dispatch_plan(tf.constant([[0, 1], [1, 0]]), 2)

    def step(x, first, last):
        with tf.GradientTape() as tape:
            tape.watch([x, first, last])
            y = F.mix_feed_forward_experts(x, tf.ones((2, 2)), plan, [first, last])
        return tape.gradient(y, [x, first, last])

    kinds = kinds_of(step, *map(tf.TensorSpec, ((2, d), (2, d, h), (2, h, d))))
    return kinds.count("BatchMatMulV2"), kinds.count("MatMul")


@pytest.mark.parametrize(
    ("size", "with_onednn", "without"),
    [
        ((4, 6), (0, 12), (0, 12)),
        ((D, H), (0, 12), (12, 4)),
        ((512, H), (4, 8), (12, 4)),
    ],
    ids=["small", "middle", "large"],
)
def test_each_product_is_taken_as_it_is_fastest(onednn, size, with_onednn, without):
    """Forward always plain; large kernels' gradients in a batch, without oneDNN twice."""
    assert products_of_a_step(*size) == (with_onednn if onednn else without)


@pytest.mark.parametrize("shape", [(1, None, H), (None, D, H), None])
def test_kernels_of_unknown_shape_are_multiplied(onednn, shape):
    run = tf.function(
        expert_products.times,
        input_signature=[tf.TensorSpec((1, None, D)), tf.TensorSpec(shape)],
    )
    y = run(tf.ones((1, 3, D)), tf.ones((1, D, H)))
    np.testing.assert_array_equal(y, np.full((1, 3, H), D))


def test_on_gpus_products_are_batched(onednn):
    with runtime.gpu_operations():
        kinds = kinds_of(
            expert_products.times, tf.TensorSpec((1, None, D)), tf.TensorSpec((1, D, H))
        )
    assert kinds == ["Placeholder", "Placeholder", "BatchMatMulV2", "Identity"]


def test_other_runtimes_get_plain_products():
    with runtime.plain_operations():
        kinds = kinds_of(
            expert_products.times, tf.TensorSpec((None, D)), tf.TensorSpec((D, H))
        )
    assert kinds == ["Placeholder", "Placeholder", "MatMul", "Identity"]
