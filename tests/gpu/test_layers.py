"""Every layer of the table on a GPU, against the same layer on the processor."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.conformance.descriptors import DESCRIPTORS


@pytest.fixture(autouse=True)
def _whole_float32():
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(before)


def step_on(device, row, weights, training):
    """Result, losses and gradients of one step, and the weights it began with."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    inputs = row.inputs()
    with tf.device(device):
        layer = row.make()
        layer(inputs)
        if weights is not None:
            layer.set_weights(weights)
        weights = layer.get_weights()
        variables = [v.value for v in layer.trainable_variables]
        keras.utils.set_random_seed(1)

        @tf.function(autograph=False)
        def step(x):
            with tf.GradientTape() as tape:
                tape.watch([x] if x.dtype.is_floating else [])
                result = row.result(layer(x, training=training))
                signs = tf.range(tf.size(result)) % 3
                signs = tf.reshape(tf.cast(signs, result.dtype) - 1, tf.shape(result))
                total = tf.reduce_sum(result * signs)
                total += sum(tf.cast(loss, total.dtype) for loss in layer.losses)
            watched = [x, *variables] if x.dtype.is_floating else variables
            gradients = tape.gradient(total, watched, unconnected_gradients="zero")
            return result, total, [tf.convert_to_tensor(each) for each in gradients]

        found = step(tf.constant(inputs))
    return [np.asarray(each) for each in tf.nest.flatten(found)], weights


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("row", DESCRIPTORS, ids=lambda row: row.name)
def test_a_gpu_computes_what_the_processor_does(row, training):
    if training and "sampled" in row.name.lower():
        pytest.skip("the candidates of a step are drawn by another generator")
    expected, weights = step_on("CPU:0", row, None, training)
    found, _ = step_on("GPU:0", row, weights, training)
    for ours, wanted in zip(found, expected, strict=True):
        apart = np.linalg.norm(ours - wanted)
        assert apart <= 1e-4 * np.linalg.norm(wanted) + 1e-6
