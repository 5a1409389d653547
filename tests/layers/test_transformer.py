import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers
from keras_moe.layers.routing_record import recorded_routing
from tests import own_layers
from tests.oracles import transformer as oracle

WIDTH = 8


def mixture(gating=None, **kwargs):
    gating = gating or layers.TopKGating(k=2)
    return layers.MoE(layers.FeedForwardExperts(4, hidden_units=6), gating, **kwargs)


def tokens(rng, batch=2, time=5, width=WIDTH):
    return rng.normal(size=(batch, time, width)).astype("float32")


def spread(layer, rng):
    """Weights none of which is zero or one, so that each of them matters."""
    layer.set_weights(
        [
            w if w.dtype.kind in "iu" else rng.normal(size=w.shape)
            for w in layer.get_weights()
        ]
    )


@pytest.mark.parametrize("groups", [4, 2])
def test_cached_attention_with_the_weights_of_keras_computes_the_same(rng, groups):
    x, value = tokens(rng), tokens(rng, time=3)
    mask = rng.random((2, 5, 3)) < 0.7
    mask[..., 0] = True
    if groups == 4:
        theirs = keras.layers.MultiHeadAttention(4, key_dim=3)
    else:
        theirs = keras.layers.GroupQueryAttention(3, 4, groups)
    ours = layers.CachedAttention(4, groups, head_dim=3)
    theirs.build(x.shape, value.shape)
    ours.build(x.shape, value.shape)
    spread(theirs, rng)
    ours.set_weights(theirs.get_weights())
    names = [
        [w.path.split("/")[-2:] for w in layer.weights] for layer in (ours, theirs)
    ]
    assert names[0] == names[1]
    np.testing.assert_allclose(
        ours(x, value, attention_mask=mask),
        theirs(x, value, attention_mask=mask),
        atol=1e-4,
    )


@pytest.mark.parametrize("first", [True, False])
def test_a_block_equals_the_loops(rng, first):
    x, source = tokens(rng), tokens(rng, time=3, width=6)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    source_mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
    block = layers.MoETransformerBlock(
        2, feed_forward=7, causal=True, max_wavelength=9.0, normalize_first=first
    )
    block(x, source)
    spread(block, rng)
    causal = np.tril(np.ones((5, 5), bool))
    own, cross, norms, dense = (
        [w.numpy().astype("float64") for layer in parts for w in layer.weights]
        for parts in (
            [block.attention],
            [block.cross_attention],
            [
                block.normalization,
                block.cross_normalization,
                block.feed_forward_normalization,
            ],
            [block.hidden_dense, block.output_dense],
        )
    )
    seen = causal & mask[:, np.newaxis] & mask[..., np.newaxis]
    seen_source = source_mask[:, np.newaxis] & mask[..., np.newaxis]
    branches = [
        lambda x: oracle.multi_head(x, x, seen, own, 9.0),
        lambda x: oracle.multi_head(x, source.astype("float64"), seen_source, cross),
        lambda x: oracle.dense_network(x, *dense),
    ]
    expected = oracle.block(
        np.where(mask[..., np.newaxis], x, 0).astype("float64"),
        [(b, *norms[2 * i : 2 * i + 2]) for i, b in enumerate(branches)],
        first,
    )
    found = block(x, source, mask=mask, encoder_outputs_mask=source_mask)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


CACHED = {
    "groups": lambda: layers.MoETransformerBlock(
        2,
        layers.HierarchicalMoE(layers.FeedForwardExperts(4, 6), 2, k=(2, 1)),
        causal=True,
    ),
    "rotary, shared keys": lambda: layers.MoETransformerBlock(
        4,
        mixture(),
        causal=True,
        num_key_value_heads=2,
        max_wavelength=20.0,
    ),
    "dense, post-norm": lambda: layers.MoETransformerBlock(
        2, causal=True, normalize_first=False
    ),
}


@pytest.mark.parametrize("kind", CACHED)
@pytest.mark.parametrize("with_encoder", [False, True])
def test_some_positions_at_a_time_equal_all_at_once(rng, kind, with_encoder):
    x, source = tokens(rng, time=6), tokens(rng, time=3, width=6)
    block = CACHED[kind]()
    options, masks = {}, {}
    if with_encoder:
        source[1, 2] = np.nan
        masks["encoder_outputs_mask"] = np.array([[1, 1, 1], [1, 1, 0]], bool)
        options = {"encoder_outputs": source, **masks}
    block(x, **options)
    spread(block, rng)
    expected = block(x, **options)
    cache, index, found = block.initial_cache(2, 9, **options), 0, []
    for size in (3, 1, 2):
        part = x[:, index : index + size]
        outputs, cache = block.call_with_cache(part, cache, index, **masks)
        found.append(outputs)
        index += size
    np.testing.assert_allclose(tf.concat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_cache_stand_where_their_texts_end(rng):
    # Texts of 4 and 2 positions, filled up at the end, then two more each.
    x, lengths = tokens(rng, time=6), np.array([4, 2])
    block = CACHED["rotary, shared keys"]()
    block(x)
    spread(block, rng)
    padded = (
        np.where(np.arange(4) < lengths[:, None], 1.0, np.nan)[..., None] * x[:, :4]
    )

    @tf.function(autograph=False)
    def run():
        cache = block.initial_cache(2, 6)
        real = tf.sequence_mask(lengths, 4)
        outputs, cache = block.call_with_cache(padded, cache, 0, mask=real)
        index = tf.constant(lengths)
        for _ in range(2):
            more = tf.gather(x, index, batch_dims=1)[:, tf.newaxis]
            last, cache = block.call_with_cache(more, cache, index)
            index += 1
        return outputs, last

    outputs, last = run()
    for row, length in enumerate(lengths):
        alone = block(x[row : row + 1, : length + 2])[0]
        np.testing.assert_allclose(
            outputs[row, :length], alone[:length], rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(last[row, 0], alone[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_causal_block_does_not_look_ahead_and_padding_reaches_nobody(rng, compiled):
    x = tokens(rng)
    block = layers.MoETransformerBlock(2, mixture(), causal=True)
    block(x)
    call = tf.function(block.call, jit_compile=True) if compiled else block
    later = np.concatenate([x[:, :3], tokens(rng, time=2)], axis=1)
    before, after = call(x)[:, :3], call(later)[:, :3]
    np.testing.assert_allclose(before, after, atol=1e-6)
    mask = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    bad = np.where(mask[..., None], x, np.nan)
    with tf.GradientTape() as tape:
        found = call(bad, mask=tf.constant(mask))
        total = tf.reduce_sum(tf.boolean_mask(found, mask))
    np.testing.assert_allclose(found[0, :3], before[0], atol=1e-5)
    alone = block(x[1:, 1:])  # no positions in this block: a shift changes nothing
    np.testing.assert_allclose(found[1, 1:], alone[0], atol=1e-5)
    for gradient in tape.gradient(total, [v.value for v in block.trainable_variables]):
        assert np.isfinite(tf.convert_to_tensor(gradient)).all()


def test_padding_is_not_routed(rng):
    x, mask = tokens(rng), np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
    block = layers.MoETransformerBlock(2, mixture())
    with recorded_routing([block.moe]) as records:
        block(x, mask=mask)
    (record,) = records.values()
    assert sum(np.asarray(record[0].result.statistics.counts)) == 2 * mask.sum()


def test_masks_of_keras_and_files_in_a_model_with_an_encoder(rng, tmp_path):
    def embedded(name):
        ids = keras.Input((None,), dtype="int32", name=name)
        return ids, keras.layers.Embedding(9, WIDTH, mask_zero=True)(ids)

    source_ids, source = embedded("source")
    ids, x = embedded("target")
    source = layers.MoETransformerBlock(2, shared := mixture())(source)
    x = layers.MoETransformerBlock(2, shared, causal=True)(x, source)
    model = keras.Model([source_ids, ids], x)
    inputs = [np.array([[1, 2, 0, 0], [3, 4, 5, 6]]), np.array([[3, 2, 0], [1, 5, 2]])]
    shorter = [inputs[0][:1, :2], inputs[1][:1, :2]]
    outputs = model(inputs)
    np.testing.assert_allclose(outputs[:1, :2], model(shorter), atol=1e-5)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(copy(inputs), outputs)
    assert len(copy.weights) == len(model.weights)


@keras.saving.register_keras_serializable(package="own")
class HubAttention(keras.layers.MultiHeadAttention):
    """The call of keras_hub's CachedMultiHeadAttention, with positions ignored."""

    def call(
        self, query, value, attention_mask=None, cache=None, cache_update_index=None
    ):
        if cache is None:
            return super().call(query, value, attention_mask=attention_mask)
        new = keras.ops.stack([value, value], axis=1)
        cache = keras.ops.slice_update(cache, [0, 0, cache_update_index, 0], new)
        outputs = super().call(query, cache[:, 0], attention_mask=attention_mask)
        return outputs, cache


def test_attention_of_a_user_with_and_without_a_cache(rng):
    x = tokens(rng, time=4)
    block = layers.MoETransformerBlock(HubAttention(2, key_dim=3), causal=True)
    expected = block(x)
    cache, found = {"self": tf.zeros((2, 2, 4, WIDTH))}, []
    for index in range(4):
        outputs, cache = block.call_with_cache(x[:, index : index + 1], cache, index)
        found.append(outputs)
    np.testing.assert_allclose(tf.concat(found, 1), expected, atol=1e-5)
    with pytest.raises(ValueError, match="`attention` must have a cache"):
        block.initial_cache(2, 4)


def test_every_place_has_a_normalization_of_the_given_kind(rng):
    x = tokens(rng)
    given = keras.layers.LayerNormalization(epsilon=0.5, center=False)
    block = layers.MoETransformerBlock(2, normalization=given)
    block(x, x)
    norms = [
        block.normalization,
        block.cross_normalization,
        block.feed_forward_normalization,
    ]
    assert norms[0] is given
    assert len({id(norm) for norm in norms}) == 3
    assert [norm.epsilon for norm in norms] == [0.5] * 3
    assert len({norm.name for norm in norms}) == 3
    if hasattr(keras.layers, "RMSNormalization"):
        block = layers.MoETransformerBlock(
            2, normalization=keras.layers.RMSNormalization()
        )
        assert block(x).shape == x.shape


def test_attention_masks_are_combined(rng):
    x = tokens(rng)
    block = layers.MoETransformerBlock(2, causal=True)
    # Everybody sees itself alone: as sequences of one position.
    outputs = block(x, attention_mask=np.eye(5, dtype=bool)[np.newaxis])
    alone = tf.concat([block(x[:, i : i + 1]) for i in range(5)], axis=1)
    np.testing.assert_allclose(outputs, alone, atol=1e-6)


@keras.saving.register_keras_serializable(package="own")
class ChoosingGating(own_layers.StockGating):
    sees_other_tokens = True


def test_errors(rng):
    x = tokens(rng)
    for moe in (
        mixture(ChoosingGating()),
        layers.HierarchicalMoE(
            layers.FeedForwardExperts(4, 6),
            2,
            k=(2, 1),
            primary_gating=ChoosingGating(),
        ),
    ):
        with pytest.raises(ValueError, match="ChoosingGating, which compares tokens"):
            layers.MoETransformerBlock(2, moe, causal=True)
        layers.MoETransformerBlock(2, moe)
    with pytest.raises(ValueError, match="`attention`.*attention=0"):
        layers.MoETransformerBlock(0)
    with pytest.raises(ValueError, match="`max_wavelength` must be None.*100"):
        layers.MoETransformerBlock(layers.CachedAttention(2), max_wavelength=100)
    with pytest.raises(ValueError, match="`moe` must be a MoE"):
        layers.MoETransformerBlock(2, keras.layers.Dense(8))
    with pytest.raises(ValueError, match="only one may be given.*feed_forward=3"):
        layers.MoETransformerBlock(2, mixture(), feed_forward=3)
    with pytest.raises(ValueError, match="3 features of 8"):
        layers.MoETransformerBlock(2, feed_forward=keras.layers.Dense(3))(x)
    with pytest.raises(ValueError, match="`num_heads` must divide.*num_heads=3.*=8"):
        layers.MoETransformerBlock(3)(x)
    with pytest.raises(ValueError, match="`num_key_value_heads` must divide.*=3.*=4"):
        layers.CachedAttention(4, 3)
    with pytest.raises(ValueError, match="even.*head_dim=1"):
        layers.CachedAttention(8, max_wavelength=9.0)(x)
    with pytest.raises(ValueError, match="not built"):
        layers.CachedAttention(8).initial_cache(1, 2)
    block = layers.MoETransformerBlock(2)
    with pytest.raises(ValueError, match="must be built before"):
        block.initial_cache(1, 2)
    block(x)
    with pytest.raises(ValueError, match="True in this call, False when"):
        block(x, x)
    with pytest.raises(ValueError, match="`mask` must have the shape"):
        block(x, mask=np.ones((2, 4), bool))
    attention = layers.CachedAttention(2, max_wavelength=9.0)
    attention.build(x.shape)
    cache = attention.initial_cache(2, 3)
    with pytest.raises(ValueError, match="`cache_update_index` must be given"):
        attention(x, cache=cache)
