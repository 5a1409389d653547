"""The embedding of the models: the same as that of Keras, whatever it is made of."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe.layers.embedding import Embedding

IDS = np.array([[1, 4, 4], [0, 2, 1]], "int32")


def both(**options):
    """The two layers, with the same weights."""
    found = [kind(5, 3, **options) for kind in (Embedding, keras.layers.Embedding)]
    for layer in found:
        layer.build((None, None))
    found[0].set_weights(found[1].get_weights())
    return found


@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_bfloat16"])
def test_values_and_gradients_are_those_of_keras(policy):
    answers, gradients = [], []
    for layer in both(dtype=policy):
        with tf.GradientTape() as tape:
            answers.append(layer(IDS))
            total = tf.reduce_sum(tf.square(tf.cast(answers[-1], "float64")))
        gradients.append(tape.gradient(total, layer.embeddings.value))
    assert answers[0].dtype == answers[1].dtype
    np.testing.assert_array_equal(*(tf.cast(a, "float64") for a in answers))
    np.testing.assert_allclose(*map(tf.convert_to_tensor, gradients), rtol=1e-6)


def test_low_rank_adaptation_is_that_of_keras():
    layers = both()
    for layer in layers:
        layer.enable_lora(2)
        for part in (layer.lora_embeddings_a, layer.lora_embeddings_b):
            part.assign(np.arange(np.prod(part.shape)).reshape(part.shape))
    np.testing.assert_allclose(*(layer(IDS) for layer in layers), rtol=1e-6)


def test_the_table_is_not_read_whole():
    layer = both()[0]
    graph = tf.function(layer.__call__).get_concrete_function(IDS).graph
    kinds = {operation.type for operation in graph.get_operations()}
    assert "ResourceGather" in kinds
    assert "ReadVariableOp" not in kinds
