"""What a transformer block refuses, and what it hands on to its parts."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, upcycle
from keras_moe.layers.routing_record import recorded_routing

WIDTH = 8
CHOOSING = "ExpertChoiceGating"


def experts(num_experts=4):
    return layers.FeedForwardExperts(num_experts, hidden_units=6)


def mixture(gating=None, **kwargs):
    return layers.MoE(experts(), gating or layers.TopKGating(k=2), **kwargs)


def choosing():
    return mixture(layers.ExpertChoiceGating(capacity_factor=2.0))


def tokens(rng, batch=2, time=5, width=WIDTH):
    return rng.normal(size=(batch, time, width)).astype("float32")


def sequence(*parts):
    return keras.Sequential([keras.layers.Dense(WIDTH), *parts])


def spread(layer, rng):
    layer.set_weights(
        [
            w if w.dtype.kind in "iu" else rng.normal(size=w.shape)
            for w in layer.get_weights()
        ]
    )


@pytest.mark.parametrize(
    "parts",
    [
        lambda: {"feed_forward": sequence(choosing())},
        lambda: {"feed_forward": sequence(keras.Sequential([choosing()]))},
        lambda: {"moe": mixture(shared_experts=sequence(choosing()))},
        lambda: {"moe": layers.MoE(layers.ExpertList([choosing(), choosing()]))},
    ],
    ids=["feed-forward", "nested", "shared experts", "experts"],
)
def test_no_gate_inside_a_causal_block_may_see_other_tokens(parts):
    layers.MoETransformerBlock(2, **parts())
    with pytest.raises(ValueError, match=CHOOSING):
        layers.MoETransformerBlock(2, **parts(), causal=True)


def test_a_gate_that_comes_later_may_not_either(rng):
    x = tokens(rng)
    block = layers.MoETransformerBlock(2, mixture(), causal=True)
    block.moe.gating = layers.ExpertChoiceGating(4)
    with pytest.raises(ValueError, match=CHOOSING):
        block(x)
    dense = layers.MoETransformerBlock(2, feed_forward=6, causal=True)
    dense(x)
    with pytest.raises(ValueError, match=CHOOSING):
        upcycle(
            dense,
            num_experts=4,
            gating=lambda: layers.ExpertChoiceGating(capacity_factor=4.0),
            inputs=x,
        )


def test_a_mixture_is_given_as_moe():
    with pytest.raises(ValueError, match="`feed_forward` must not be a mixture.*`moe`"):
        layers.MoETransformerBlock(2, feed_forward=mixture())


@keras.saving.register_keras_serializable(package="own")
class Around(keras.layers.Layer):
    """A layer of a user, whose `call` hands on a mask."""

    def __init__(self):
        super().__init__()
        self.moe = mixture()

    def build(self, shape):
        self.moe.build(shape)

    def call(self, inputs, mask=None):
        return self.moe(inputs, mask=mask)

    def compute_output_shape(self, shape):
        return shape


@pytest.mark.parametrize(
    "network",
    [lambda: sequence(mixture()), lambda: sequence(sequence(mixture())), Around],
    ids=["sequential", "nested", "a user's"],
)
@pytest.mark.parametrize("cached", [False, True])
def test_padding_is_not_routed_by_a_mixture_within_a_network(rng, network, cached):
    x, mask = tokens(rng), np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    block = layers.MoETransformerBlock(2, feed_forward=network())
    block(x)
    (moe,) = (e for e in block._flatten_layers() if isinstance(e, layers.MoE))
    with recorded_routing([moe]) as records:
        if cached:
            block.call_with_cache(x, block.initial_cache(2, 5), 0, mask=mask)
        else:
            block(x, mask=mask)
    (record,) = records.values()
    assert sum(np.asarray(record[0].result.statistics.counts)) == 2 * mask.sum()


@pytest.mark.parametrize(
    "network",
    [
        lambda: 6,
        lambda: keras.Sequential([keras.layers.Dense(6), keras.layers.Dense(WIDTH)]),
    ],
    ids=["units", "sequential"],
)
def test_padding_is_not_routed_after_upcycling(rng, network):
    x, mask = tokens(rng), np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    dense = layers.MoETransformerBlock(2, feed_forward=network())
    expected = dense(x, mask=mask)
    block = upcycle(dense, num_experts=4, k=2, inputs=x)
    (moe,) = (e for e in block._flatten_layers() if isinstance(e, layers.MoE))
    with recorded_routing([moe]) as records:
        found = block(x, mask=mask)
    (record,) = records.values()
    assert sum(np.asarray(record[0].result.statistics.counts)) == 2 * mask.sum()
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)


def test_cross_attention_has_no_positions_whoever_makes_the_attention(rng):
    x, source = tokens(rng), tokens(rng, time=3)
    given = layers.CachedAttention(2, max_wavelength=9.0)
    block = layers.MoETransformerBlock(given, causal=True)
    block(x, source)
    spread(block, rng)
    expected = block(x, source)
    # The order of the source says nothing.
    np.testing.assert_allclose(block(x, source[:, ::-1]), expected, atol=1e-4)
    cache, found = block.initial_cache(2, 5, source), []
    for i in range(5):
        outputs, cache = block.call_with_cache(x[:, i : i + 1], cache, i)
        found.append(outputs)
    np.testing.assert_allclose(tf.concat(found, 1), expected, rtol=1e-4, atol=1e-4)
    assert block.attention.max_wavelength == 9.0


def test_positions_that_a_cache_has_no_room_for(rng):
    x = tokens(rng, time=6)
    block = layers.MoETransformerBlock(2, causal=True)
    block(x)
    cache = block.initial_cache(2, 3)
    with pytest.raises(ValueError, match="`index`.*length=3.*6 positions"):
        block.call_with_cache(x, cache, 0)
    with pytest.raises(ValueError, match="`index`.*length=3.*6 positions"):
        tf.function(block.call_with_cache)(x, cache, tf.constant(0))
    cache = block.initial_cache(2, 6)
    one = x[:, :1]
    for index in (-1, 6, np.int64(9), tf.constant(9), tf.constant([0, 6]), [6, 0]):
        with pytest.raises(ValueError, match="`index` .*length=6"):
            block.call_with_cache(one, cache, index)
    with pytest.raises(ValueError, match="`index` .*length=6"):
        tf.function(lambda x: block.call_with_cache(x, cache, 9))(one)
    with pytest.raises(ValueError, match="`index` .*length=6"):
        block.call_with_cache(x[:, :2], cache, 5)
    with pytest.raises(ValueError, match="`index` must be.*float"):
        block.call_with_cache(one, cache, 1.5)
    with pytest.raises(ValueError, match=r"`index` .*\(3,\)"):
        block.call_with_cache(one, cache, tf.constant([0, 1, 2]))
    with pytest.raises(ValueError, match="`cache`.*2 rows.*1 row"):
        block.call_with_cache(one[:1], cache, 0)
    # Padding at the end of a row needs no room.
    mask = np.array([[True, False], [True, True]])
    outputs, _ = block.call_with_cache(x[:, :2], cache, tf.constant([5, 4]), mask=mask)
    expected, _ = block.call_with_cache(one, cache, tf.constant([5, 4]))
    np.testing.assert_allclose(outputs[0, 0], expected[0, 0], atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(2, 5, 4), (2, 4, 5), (3, 5, 5), (1, 2, 5, 5)], ids=str
)
def test_an_attention_mask_that_does_not_broadcast(rng, shape):
    x, mask = tokens(rng), np.ones(shape, bool)
    for causal in (False, True):
        block = layers.MoETransformerBlock(2, causal=causal)
        with pytest.raises(ValueError, match=r"`attention_mask`.*\(2, 5, 5\)"):
            block(x, attention_mask=mask)
        with pytest.raises(ValueError, match=r"`attention_mask`.*\(2, 5, 5\)"):
            block.call_with_cache(x, block.initial_cache(2, 5), 0, attention_mask=mask)
    with pytest.raises(ValueError, match=r"`attention_mask`.*\(2, 5, 5\)"):
        layers.CachedAttention(2)(x, attention_mask=mask)
    seen = np.ones((5, 5), bool)
    np.testing.assert_allclose(block(x, attention_mask=seen), block(x), atol=1e-6)


def test_what_is_attended_to_has_the_rows_of_the_inputs(rng):
    x, source = tokens(rng), tokens(rng, batch=3, time=4)
    block = layers.MoETransformerBlock(2)
    with pytest.raises(ValueError, match="`encoder_outputs`.*3 rows.*2 rows"):
        block(x, source)
    block(x, source[:2])
    with pytest.raises(ValueError, match="`encoder_outputs`.*shape.*4, 8"):
        block(x, source[0])
    cache = {**block.initial_cache(2, 5, source[:2])}
    cache["encoder"] = block.initial_cache(3, 5, source)["encoder"]
    with pytest.raises(ValueError, match="`cache`.*3 rows.*2 rows"):
        block.call_with_cache(x, cache, 0)


def test_attention_without_a_cache(rng):
    x = tokens(rng)
    block = layers.MoETransformerBlock(keras.layers.MultiHeadAttention(2, key_dim=3))
    block(x)
    cache = {"self": tf.zeros((2, 2, 5, 2, 3))}
    with pytest.raises(ValueError, match="`attention` must have a cache.*MultiHead"):
        block.call_with_cache(x, cache, 0)


def test_normalization_and_name():
    with pytest.raises(ValueError, match="`normalization` must be.*'rms'"):
        layers.MoETransformerBlock(2, normalization="rms")
    assert layers.MoETransformerBlock(2).name.startswith("moe_transformer_block")
    assert layers.MoETransformerBlock(2, name="a").name == "a"
