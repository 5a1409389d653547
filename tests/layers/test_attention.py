import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers
from tests.oracles import attention as oracle


def built_attention(rng, query, memory, units=3):
    layer = layers.MultiplicativeAttention(units)
    layer(query, memory)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.weights])
    return layer


def batch(rng):
    query = rng.normal(size=(2, 3, 4)).astype("float32")
    memory = rng.normal(size=(2, 5, 6)).astype("float32")
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    return query, memory, mask


def test_the_layer_equals_the_loops(rng):
    query, memory, mask = batch(rng)
    layer = built_attention(rng, query, memory)
    weights = (layer.key_kernel, layer.query_kernel, layer.scale)
    expected = oracle.attention(query, memory, *map(np.asarray, weights), mask)
    outputs = layer(query, memory, memory_mask=mask)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)


def test_a_keras_mask_on_the_memory_is_honoured(rng):
    query, memory, mask = batch(rng)
    layer = built_attention(rng, query, memory)
    masked = tf.constant(memory)
    masked._keras_mask = tf.constant(mask)
    np.testing.assert_array_equal(
        layer(query, masked), layer(query, memory, memory_mask=mask)
    )


def test_the_paper_size_has_the_counted_parameters():
    # 2 * d * d + d, as `models.count` has it.
    layer = layers.MultiplicativeAttention()
    layer.build((None, None, 16), (None, None, 16))
    assert layer.count_params() == 2 * 16 * 16 + 16


def test_a_new_layer_is_not_saturated(rng):
    # Saturated tanhs on both sides: scores are sums of 256 signs times V. With V = 1
    # their standard deviation is 16 and one position takes all; with V = 1/16 it is 1.
    layer = layers.MultiplicativeAttention()
    query, memory = (rng.normal(scale=50.0, size=(4, 8, 256)) for _ in range(2))
    layer(query.astype("float32"), memory.astype("float32"))
    weights = layer.weights_of(
        tf.constant(query, tf.float32), layer.keys_of(tf.constant(memory, tf.float32))
    ).numpy()
    assert weights.max(-1).mean() < 0.6  # uniform: 1/8


def by_hand(layer, inputs, memory, mask):
    """The recurrence as it is written, with the attention of the oracle."""
    attention = layer.attention
    weights = (attention.key_kernel, attention.query_kernel, attention.scale)
    h, c = (np.zeros((len(inputs), size), "float32") for size in layer.cell.state_size)
    outputs = []
    for step in range(inputs.shape[1]):
        context = oracle.attention(h[:, None], memory, *map(np.asarray, weights), mask)
        x = np.concatenate([inputs[:, step], context[:, 0]], axis=1)
        h, (_, c) = layer.cell(tf.constant(x, tf.float32), [h, c])
        h, c = h.numpy(), np.asarray(c)
        outputs.append(h)
    return np.stack(outputs, axis=1), h, c


@pytest.mark.parametrize("kind", ["plain", "projected"])
def test_attention_lstm_equals_the_steps_by_hand(rng, kind):
    inputs, memory, mask = batch(rng)
    cell = (
        keras.layers.LSTMCell(4)
        if kind == "plain"
        else layers.ProjectedLSTMCell(8, projection_units=4)
    )
    layer = layers.AttentionLSTM(cell)
    layer(inputs, memory)
    layer.set_weights([rng.normal(size=w.shape) for w in layer.weights])
    expected, h, c = by_hand(layer, inputs, memory, mask)
    outputs, state = layer(inputs, memory, memory_mask=mask)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(state[0], h, atol=1e-5)
    np.testing.assert_allclose(state[1], c, atol=1e-5)
    # The weights that it reports are those it used: the mean of the memory by them
    # is the context, which the second step's output depends on.
    weights = layer.attention_weights(outputs, memory, mask).numpy()
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(weights[0, :, 3:], 0.0)
    queries = np.concatenate([np.zeros_like(expected[:, :1]), expected[:, :-1]], axis=1)
    names = (layer.attention.key_kernel, layer.attention.query_kernel)
    scores = oracle.scores(
        queries, memory, *map(np.asarray, names), np.asarray(layer.attention.scale)
    )
    np.testing.assert_allclose(weights[1], tf.nn.softmax(scores[1]), atol=1e-5)


def test_consecutive_rows_share_a_memory(rng):
    inputs, memory, mask = batch(rng)
    layer = layers.AttentionLSTM(keras.layers.LSTMCell(4))
    many = rng.normal(size=(6, 3, 4)).astype("float32")
    outputs, _ = layer(many, memory, memory_mask=mask)
    alone, _ = layer(many, np.repeat(memory, 3, 0), memory_mask=np.repeat(mask, 3, 0))
    np.testing.assert_allclose(outputs, alone, atol=1e-6)
    assert np.abs(outputs[2] - outputs[3]).max() > 1e-3


def test_going_on_with_the_state_equals_one_call(rng):
    inputs, memory, mask = batch(rng)
    layer = layers.AttentionLSTM(keras.layers.LSTMCell(4))
    outputs, state = layer(inputs, memory, memory_mask=mask)
    first, middle = layer(inputs[:, :1], memory, memory_mask=mask)
    rest, last = layer(inputs[:, 1:], memory, memory_mask=mask, initial_state=middle)
    np.testing.assert_allclose(tf.concat([first, rest], 1), outputs, atol=1e-6)
    for a, b in zip(state, last, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_no_steps_at_all(rng):
    _, memory, _ = batch(rng)
    layer = layers.AttentionLSTM(keras.layers.LSTMCell(4))
    outputs, state = layer(np.zeros((2, 0, 4), "float32"), memory)
    assert outputs.shape == (2, 0, 4)
    np.testing.assert_array_equal(state[0], np.zeros((2, 4)))


def test_errors():
    with pytest.raises(ValueError, match="units=0"):
        layers.MultiplicativeAttention(0)
    with pytest.raises(ValueError, match="dtype=int32"):
        layers.MultiplicativeAttention()(
            np.ones((1, 2, 3), "int32"), np.ones((1, 2, 3))
        )
    with pytest.raises(ValueError, match=r"`cell`.*state_size=4"):
        layers.AttentionLSTM(keras.layers.GRUCell(4))
