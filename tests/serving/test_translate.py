"""The signature `translate` answers through the C++ loader as in Python."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text

import keras_moe
from examples.serving.c_api_child import Child
from keras_moe import data, layers, models
from keras_moe.serving.translate import translation_signatures

TEXTS = ["the cat", "a mat sat on the cat", "", "日本 cat", "the cat saw the mat"]


def text_ops():
    """The only library that a server needs beside TensorFlow's own."""
    folder = Path(tensorflow_text.__file__).parent / "python" / "ops"
    return [str(folder / "_sentencepiece_tokenizer.so")]


def mixture(name):
    return layers.MoE(
        layers.FeedForwardExperts(5, hidden_units=8),
        layers.NoisyTopKGating(k=2, gate_initializer="glorot_normal"),
        activation="sigmoid",
        name=name,
    )


def translator():
    texts = ["a cat sat on a mat", "the cat saw the mat", "le chat est là", "die Katze"]
    vocabulary = data.SubwordVocabulary.learn(texts * 3, 330, ["fr", "de"])
    model = models.MoETranslator(
        len(vocabulary),
        8,
        encoder_middle=mixture("encoder_moe"),
        decoder_middle=mixture("decoder_moe"),
        vocabulary=vocabulary,
    )
    model.build(None)
    generator = np.random.default_rng(5)
    for weight in model.trainable_weights:
        if weight.path.endswith(("kernel", "embeddings")):
            weight.assign(generator.normal(size=weight.shape, scale=0.7))
    # Letters, and not the bytes and tokens, which are no text; not the end at once.
    pieces = vocabulary.pieces(range(len(vocabulary)))
    bias = np.array(model.softmax.bias)
    bias[[i for i, piece in enumerate(pieces) if piece.startswith("<")]] = -50.0
    bias[vocabulary.eos_id] = -3.0
    model.softmax.bias.assign(bias)
    return model


@pytest.mark.slow
def test_strings_in_and_strings_out_equal_python(tmp_path):
    model = translator()
    languages = ["fr", "de", "fr", "de", "de"]
    options = {"num_beams": 4, "length_penalty": 0.2, "max_length": 100}
    expected = model.translate(TEXTS, languages, **options)
    scores = model.translate_tensors(TEXTS, languages, **options)[1]
    assert len(set(expected)) > 2
    path = keras_moe.serving.export(model, tmp_path)
    with Child(path, text_ops()) as child:
        answer = child("translate", texts=TEXTS, target_languages=languages)
        assert [t.decode() for t in answer["translations"]] == expected
        np.testing.assert_allclose(answer["scores"], scores, rtol=1e-5)
        # One language for all, and a batch of one.
        alone = child("translate", texts=TEXTS[1:2], target_languages=["de"])
        assert alone["translations"][0].decode() == expected[1]
        every = child("translate", texts=TEXTS, target_languages=["de"])
        wanted = model.translate(TEXTS, "de", **options)
        assert [t.decode() for t in every["translations"]] == wanted
        # Logits, as in Keras.
        source = np.array([[3, 9, 2], [4, 2, 0]], "int32")
        target = np.array([[2, 8], [2, 0]], "int32")
        logits = child("serving_default", source=source, target_inputs=target)
        np.testing.assert_allclose(
            logits["outputs"], model((source, target)), rtol=1e-5, atol=1e-5
        )
        for request in (
            {"texts": TEXTS, "target_languages": ["nl"]},
            {"texts": TEXTS, "target_languages": ["de", "fr"]},
            {"texts": np.array([], object), "target_languages": ["de"]},
            {"texts": [TEXTS], "target_languages": ["de"]},
            {"texts": np.ones(2, "int32"), "target_languages": ["de"]},
        ):
            with pytest.raises(RuntimeError):
                child.ask("translate", **request)
        # Still alive.
        again = child("translate", texts=TEXTS, target_languages=languages)
        np.testing.assert_array_equal(again["translations"], answer["translations"])


def test_without_a_vocabulary_there_are_ids_only():
    model = models.MoETranslator(20, 8)
    model.build(None)
    assert list(translation_signatures(model)) == ["serving_default"]


def test_seeding_keras_does_not_lose_the_subwords():
    # `set_random_seed` drops the kernels of eager ops, and with them a tokenizer that
    # an eager op made.
    vocabulary = translator().vocabulary
    texts = tf.data.Dataset.from_tensors(tf.constant(TEXTS[:2]))
    ids = texts.map(lambda t: vocabulary.encode_target(t).to_tensor())
    before = next(iter(ids)).numpy()
    keras.utils.set_random_seed(3)
    np.testing.assert_array_equal(next(iter(ids)), before)
    assert vocabulary.decode(tf.constant(before)).numpy()[0].decode() == TEXTS[0]
