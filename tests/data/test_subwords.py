import numpy as np
import pytest
import tensorflow as tf

from keras_moe import data

TEXTS = ["a cat sat on a mat", "the cat saw the mat", "le chat est là", "die Katze"] * 3


@pytest.fixture(scope="module")
def vocabulary():
    return data.SubwordVocabulary.learn(TEXTS, 330, ["fr", "pt_BR"])


def test_reserved_ids_and_language_tokens_come_first(vocabulary):
    assert vocabulary.pieces(range(5)) == [
        "<pad>",
        "<unk>",
        "<eos>",
        "<2fr>",
        "<2pt_BR>",
    ]
    assert len(vocabulary) <= 330  # little text gives fewer
    np.testing.assert_array_equal(vocabulary.language_ids(["pt_BR", "fr"]), [4, 3])


def test_sources_and_targets_come_back(vocabulary):
    texts = ["the cat est là", "", "日本 ≈ ☃"]  # bytes stand in for new characters
    target = vocabulary.encode_target(texts)
    source = vocabulary.encode_source(texts, ["fr", "fr", "pt_BR"])
    for row, other, language in zip(target, source, (3, 3, 4), strict=True):
        assert row[-1] == vocabulary.eos_id
        np.testing.assert_array_equal(other, [language, *row.numpy()])
    for ids in (target, target.to_tensor(), source[:, 1:]):
        found = [text.decode() for text in vocabulary.decode(ids).numpy()]
        assert found == texts
    # What follows the end is no text.
    row = [*target[0].numpy(), *target[2].numpy()]
    assert vocabulary.decode(tf.constant([row])).numpy()[0].decode() == texts[0]


def test_text_cannot_ask_for_a_language(vocabulary):
    ids = vocabulary.encode_source(["<2pt_BR> a cat <eos>"], ["fr"])[0].numpy()
    assert ids[0] == 3
    assert 4 not in ids
    assert np.sum(ids == vocabulary.eos_id) == 1


def test_it_works_in_a_graph_and_refuses_an_unknown_language(vocabulary):
    encode = tf.function(lambda t, n: vocabulary.encode_source(t, n).to_tensor())
    eager = vocabulary.encode_source(TEXTS[:2], ["fr", "fr"]).to_tensor()
    np.testing.assert_array_equal(encode(TEXTS[:2], ["fr", "fr"]), eager)
    for run in (encode, vocabulary.encode_source):
        with pytest.raises(tf.errors.InvalidArgumentError, match="among fr, pt_BR"):
            run(tf.constant(TEXTS[:2]), tf.constant(["fr", "nl"]))


def test_the_same_text_gives_the_same_pieces_and_the_config_is_all(vocabulary):
    again = data.SubwordVocabulary.learn(iter(TEXTS), 330, ["fr", "pt_BR"])
    assert again.pieces(range(len(vocabulary))) == vocabulary.pieces(
        range(len(vocabulary))
    )
    copy = data.SubwordVocabulary.from_config(vocabulary.get_config())
    assert copy.get_config() == vocabulary.get_config()
    np.testing.assert_array_equal(
        copy.encode_target(TEXTS).to_tensor(),
        vocabulary.encode_target(TEXTS).to_tensor(),
    )


def test_errors(vocabulary):
    learn = data.SubwordVocabulary.learn
    with pytest.raises(ValueError, match=r"\['fr', 'fr'\]"):
        learn(TEXTS, 400, ["fr", "fr"])
    with pytest.raises(ValueError, match="size"):
        learn(TEXTS, 200, ["fr"])  # below the 256 bytes
    with pytest.raises(ValueError, match="could not learn"):
        learn([], 400, ["fr"])
    with pytest.raises(ValueError, match=r"within \[0, .*5000"):
        vocabulary.pieces([1, 5000])
    with pytest.raises(ValueError, match="<2de>"):
        data.SubwordVocabulary(vocabulary.model, ["de", "fr"])
