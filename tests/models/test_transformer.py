import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, models, serving
from keras_moe.data.vocabulary import EOS_ID
from keras_moe.models.continuation import continue_tokens

VOCABULARY = 12


def block(gating=None, dropout=0.0, **kwargs):
    experts = layers.FeedForwardExperts(4, hidden_units=6)
    moe = layers.MoE(experts, gating or layers.TopKGating(k=2))
    return layers.MoETransformerBlock(2, moe, causal=True, dropout=dropout, **kwargs)


def learned(**kwargs):
    return models.MoETransformerLanguageModel(
        VOCABULARY,
        [block(normalize_first=False), layers.MoETransformerBlock(2, causal=True)],
        units=8,
        max_length=16,
        learned_positions=True,
        tied=True,
        **kwargs,
    )


def rotary():
    blocks = [block(max_wavelength=50.0, num_key_value_heads=1) for _ in range(2)]
    return models.MoETransformerLanguageModel(
        VOCABULARY, blocks, units=8, max_length=16
    )


def spread(model, rng):
    model.build(None)
    model.set_weights(
        [
            w if w.dtype.kind in "iu" else rng.normal(scale=0.7, size=w.shape)
            for w in model.get_weights()
        ]
    )
    return model


@pytest.mark.parametrize("make", [learned, rotary])
def test_generation_with_caches_equals_whole_texts_token_by_token(rng, make):
    model = spread(make(), rng)
    prompt = rng.integers(1, VOCABULARY, (3, 4))
    expected = prompt
    for _ in range(6):
        logits = model(expected)[:, -1].numpy()
        logits[:, 0] = -np.inf
        expected = np.concatenate([expected, logits.argmax(-1)[:, None]], axis=1)
    assert len(np.unique(expected)) > 4
    found = model.generate(prompt, max_new_tokens=6, temperature=0)
    np.testing.assert_array_equal(found, expected)


def test_texts_of_different_lengths_go_on_as_alone(rng):
    model = spread(rotary(), rng)
    texts = rng.integers(1, VOCABULARY, (2, 5))
    texts[1, 3:] = 0
    found = continue_tokens(
        model,
        tf.constant(texts, tf.int32),
        tf.constant([5, 3]),
        max_new_tokens=tf.constant([2, 6]),
        temperature=tf.zeros(2),
        top_k=tf.zeros(2, tf.int32),
        seeds=tf.zeros(2, tf.int64),
    )
    for row, (length, new) in enumerate([(5, 2), (3, 6)]):
        alone = model.generate(texts[row : row + 1, :length], new, temperature=0)
        np.testing.assert_array_equal(found[row, :new], alone[0, length:])
    np.testing.assert_array_equal(found[0, 2:], 0)


@pytest.mark.parametrize("make", [learned, rotary])
def test_padding_changes_nothing_and_is_not_counted(rng, make):
    model = spread(make(), rng)
    texts = rng.integers(1, VOCABULARY, (2, 5)).astype("int32")
    padded = np.pad(texts, [[0, 0], [0, 3]])
    np.testing.assert_allclose(model(padded)[:, :5], model(texts), atol=1e-4)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    np.testing.assert_allclose(
        model.evaluate(padded, padded, verbose=0),
        model.evaluate(texts, texts, verbose=0),
        rtol=1e-5,
    )
    routing = model.routing(padded)
    assert list(routing) == [moe.name for moe in model.moe_layers]
    for experts, gates in routing.values():
        assert experts.shape == gates.shape == (2, 8, 2)
        np.testing.assert_array_equal(experts[:, 5:], -1)
        assert experts[:, :5].min() >= 0


@pytest.mark.slow
def test_it_learns_to_count():
    starts = np.arange(1, VOCABULARY)[:, None]
    text = (starts + np.arange(6) - 1) % (VOCABULARY - 1) + 1
    model = learned(dropout=0.05)
    model.compile(
        keras.optimizers.Adam(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(text[:, :-1], text[:, 1:], epochs=60, batch_size=11, verbose=0)
    found = model.generate(text[:, :2], 4, temperature=0)
    np.testing.assert_array_equal(found, text)


@pytest.mark.slow
def test_signatures_of_an_exported_model(rng, tmp_path):
    model = spread(rotary(), rng)
    path = serving.export(model, tmp_path / "exported")
    served = tf.saved_model.load(str(path)).signatures
    # Longer than what `generate` keeps in Python: caches take the length of the text.
    ids = tf.constant(rng.integers(1, VOCABULARY, (2, 20)), tf.int32)
    logits = served["serving_default"](inputs=ids)["outputs"]
    np.testing.assert_allclose(logits, model(ids), rtol=1e-3, atol=1e-3)
    scores = served["score"](inputs=ids)["token_log_probs"]
    after_eos = tf.pad(ids[:, :-1], [[0, 0], [1, 0]], constant_values=EOS_ID)
    expected = tf.gather(tf.nn.log_softmax(model(after_eos)), ids, batch_dims=2)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3)
    new = served["generate"](
        inputs=ids[:, :4],
        temperature=tf.zeros(2),
        top_k=tf.zeros(2, tf.int32),
        max_new_tokens=tf.fill([2], 5),
        seed=tf.zeros(2, tf.int64),
    )["tokens"]
    np.testing.assert_array_equal(
        new, model.generate(ids[:, :4], 5, temperature=0)[:, 4:]
    )
    experts = served["routing"](inputs=ids)
    for name, (expected, _) in model.routing(ids[:, :16]).items():
        np.testing.assert_array_equal(experts[f"{name}_experts"][:, :16], expected)


def test_errors():
    with pytest.raises(ValueError, match="`blocks` must be a list.*causal=True"):
        models.MoETransformerLanguageModel(9, [layers.MoETransformerBlock(2)])
    with pytest.raises(ValueError, match=r"`blocks` must be a list.*Received.*\[\]"):
        models.MoETransformerLanguageModel(9, [])
    with pytest.raises(ValueError, match="`normalization` must be.*'rms'"):
        models.MoETransformerLanguageModel(9, [block()], normalization="rms")
    swapped = block()
    swapped.moe.gating = layers.ExpertChoiceGating(4)
    with pytest.raises(ValueError, match="`blocks` of.*ExpertChoiceGating"):
        models.MoETransformerLanguageModel(9, [swapped])
    model = learned()
    with pytest.raises(ValueError, match="17 tokens, max_length=16"):
        model(np.ones((1, 17), "int32"))
    with pytest.raises(ValueError, match="10 tokens, max_new_tokens=7, max_length=16"):
        model.generate(np.ones((1, 10), "int32"), 7)
    with pytest.raises(ValueError, match="training=True"):
        model.hidden_with_state([[1]], model.initial_state(1), training=True)
    with pytest.raises(ValueError, match="`inputs` must be within"):
        model(np.full((1, 3), VOCABULARY))
