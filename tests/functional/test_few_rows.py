"""Products of few rows with a large kernel, against NumPy in float64."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import keras_moe
import keras_moe.functional as F
from keras_moe import runtime
from keras_moe.functional import few_rows

D, H = 256, 512


@pytest.fixture
def without_onednn(monkeypatch):
    monkeypatch.setattr(runtime, "uses_onednn", lambda: False)


def kinds_of(function, *arguments):
    graph = tf.function(function).get_concrete_function(*arguments).graph
    return [op.type for op in graph.get_operations()]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 256, 257, 300])
def test_value_and_gradients(rng, without_onednn, rows, traced):
    x, kernel, weights = (
        rng.normal(size=shape) for shape in ((1, rows, D), (1, D, H), (1, rows, H))
    )

    def run(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = few_rows.times(x, kernel)
            total = tf.reduce_sum(tf.square(y) * tf.constant(weights, tf.float32))
        return [y, *tape.gradient(total, [x, kernel])]

    if traced:
        signature = [tf.TensorSpec((1, None, D)), tf.TensorSpec((1, D, H))]
        run = tf.function(run, input_signature=signature)
    found = run(tf.constant(x, tf.float32), tf.constant(kernel, tf.float32))
    y = x @ kernel
    dy = 2 * weights * y
    expected = [y, dy @ kernel.transpose(0, 2, 1), x.transpose(0, 2, 1) @ dy]
    for here, there in zip(found, expected, strict=True):
        scale = np.abs(there).max(initial=1.0)
        np.testing.assert_allclose(here / scale, there / scale, atol=2e-6)


def test_second_derivatives(rng, without_onednn):
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

    for here, there in zip(second(few_rows.times), second(tf.matmul), strict=True):
        assert np.abs(there).max() > 1e-4
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("onednn", [False, True])
def test_only_without_onednn_the_kernel_is_not_the_one_to_be_transposed(
    monkeypatch, onednn
):
    monkeypatch.setattr(runtime, "uses_onednn", lambda: onednn)
    plan = F.make_dispatch_plan(tf.constant([[0, 1], [1, 0]]), 2)

    def step(x, first, last):
        with tf.GradientTape() as tape:
            tape.watch([x, first, last])
            y = F.mix_feed_forward_experts(x, tf.ones((2, 2)), plan, [first, last])
        return tape.gradient(y, [x, first, last])

    shapes = (2, D), (2, D, H), (2, H, D)
    products = kinds_of(step, *map(tf.TensorSpec, shapes)).count("BatchMatMulV2")
    # Of two experts with two kernels: three each, and one more for the other number of rows.
    assert products == 4 * (3 if onednn else 4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 64, 128), "float32"), ((2, D, H), "float32"), ((1, D, H), "float64")],
)
def test_others_are_plain_products(without_onednn, shape, dtype):
    x = tf.TensorSpec((shape[0], None, shape[1]), dtype)
    kinds = kinds_of(few_rows.times, x, tf.TensorSpec(shape, dtype))
    assert kinds == ["Placeholder", "Placeholder", "BatchMatMulV2", "Identity"]


@pytest.mark.parametrize("value", ["0", "1"])
def test_uses_onednn_follows_the_environment(value):
    script = "from keras_moe import runtime; print(runtime.uses_onednn())"
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": value}
    command = [sys.executable, "-c", script]
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == str(value == "1")


def test_commands_keep_the_pages_of_large_tensors(monkeypatch):
    settings = "TF_CPU_ALLOCATOR_USE_BFC", "TF_CPU_BFC_MEM_LIMIT_IN_MB"
    for name in settings:
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    importlib.reload(keras_moe)
    assert not any(name in os.environ for name in settings)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "keras_moe", "plan"])
    importlib.reload(keras_moe)
    assert os.environ[settings[0]] == "true"
    assert int(os.environ[settings[1]]) >= 2**20
    monkeypatch.setenv(settings[0], "false")
    importlib.reload(keras_moe)
    assert os.environ[settings[0]] == "false"
