import doctest
import gzip
import lzma

import numpy as np
import pytest
import tensorflow as tf

import keras_moe
from keras_moe import data
from keras_moe.data import subwords, translation
from keras_moe.models import preset_models
from keras_moe.telemetry import information
from keras_moe.telemetry import translation as scores

EN_FR = [("A cat.", "Un chat."), ("Two cats sleep.", "Deux chats dorment.")]
EN_DE = [("A dog.", "Ein Hund."), ("No.", "Nein."), ("Yes, I do.", "Ja, doch.")]


@pytest.fixture
def folder(tmp_path):
    def text(rows):
        return "".join(f"{a}\t{b}\n" for a, b in rows).encode()

    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en-fr.tsv").write_bytes(text(EN_FR))
    (tmp_path / "train.en-de.tsv.gz").write_bytes(gzip.compress(text(EN_DE)))
    (tmp_path / "valid.en-de.tsv.xz").write_bytes(lzma.compress(text(EN_DE[:1])))
    (tmp_path / "test.en-de.tsv").write_bytes(b"\xef\xbb\xbf" + text(EN_DE[:2]))
    return tmp_path


def vocabulary_of(corpus, size=330, **options):
    return data.SubwordVocabulary.learn(
        corpus.texts(), size, corpus.target_languages, **options
    )


@pytest.mark.parametrize(
    ("module", "least"),
    [
        (subwords, 3),
        (translation, 3),
        (preset_models, 3),
        (scores, 2),
        (information, 3),
    ],
)
def test_docstring_examples_run(module, least):
    names = {"keras_moe": keras_moe, "np": np, "tf": tf}
    failed, tried = doctest.testmod(module, extraglobs=names)
    assert tried >= least
    assert failed == 0


def test_a_file_serves_both_directions(folder):
    corpus = data.load_translation_corpus(folder)
    assert corpus.directions == ("en-de", "de-en", "en-fr", "fr-en")
    assert corpus.target_languages == ("de", "en", "fr")
    sources, targets = corpus.pairs["train"]["fr-en"]
    assert list(zip(targets, sources, strict=True)) == EN_FR
    assert corpus.pairs["test"]["en-de"][0] == ["A dog.", "No."]
    # Each text once: 5 English, 2 French, 3 German.
    assert len(list(corpus.texts())) == 10
    only = data.load_translation_corpus(folder, directions=["fr-en"])
    assert only.directions == ("fr-en",)


def test_the_embedded_corpus_has_the_counted_rows():
    corpus = data.load_translation_corpus()
    assert len(corpus.directions) == 12
    # Its SOURCE says 5,063 rows, where empty cells are missing translations.
    sizes = {d: len(s) for d, (s, _) in corpus.pairs["train"].items()}
    assert max(sizes.values()) < 5063
    assert sizes["en-fr"] == sizes["fr-en"] > 3000
    assert all(text for sides in corpus.pairs["test"].values() for text in sides[0])


def test_temperature_evens_out_the_shares(folder):
    corpus = data.load_translation_corpus(folder, directions=["en-fr", "en-de"])
    np.testing.assert_allclose(corpus.sampling_weights(1.0), [2 / 5, 3 / 5])
    # sqrt(2/5) / (sqrt(2/5) + sqrt(3/5))
    np.testing.assert_allclose(
        corpus.sampling_weights(2.0), [0.4495, 0.5505], atol=1e-4
    )
    np.testing.assert_allclose(corpus.sampling_weights(1e9), [0.5, 0.5])
    with pytest.raises(ValueError, match="temperature=0.5"):
        corpus.sampling_weights(0.5)


def test_batches_hold_every_pair_once_and_are_shifted(folder):
    corpus = data.load_translation_corpus(folder)
    vocabulary = vocabulary_of(corpus)
    seen = []
    for (source, inputs), targets in corpus.dataset(
        "train", vocabulary, batch_tokens=64
    ):
        assert source.dtype == inputs.dtype == targets.dtype == tf.int32
        for row_in, row_out in zip(inputs.numpy(), targets.numpy(), strict=True):
            n = np.sum(row_out != 0)
            assert row_out[n - 1] == row_in[0] == vocabulary.eos_id
            np.testing.assert_array_equal(row_in[1:n], row_out[: n - 1])
            assert not row_in[n:].any()
        first = vocabulary.pieces(source[:, 0])
        texts = [t.decode() for t in vocabulary.decode(source[:, 1:]).numpy()]
        goals = [t.decode() for t in vocabulary.decode(targets).numpy()]
        seen += zip(first, texts, goals, strict=True)
    expected = [("<2fr>", a, b) for a, b in EN_FR] + [("<2en>", b, a) for a, b in EN_FR]
    expected += [("<2de>", a, b) for a, b in EN_DE] + [
        ("<2en>", b, a) for a, b in EN_DE
    ]
    assert sorted(seen) == sorted(expected)


def test_training_pairs_come_in_another_order_every_time(folder):
    corpus = data.load_translation_corpus(folder, directions=["en-de"])
    vocabulary = vocabulary_of(corpus)
    options = {"batch_tokens": 64, "seed": 3}

    def order(dataset):
        return [tuple(row) for _, t in dataset for row in t.numpy()[:, :3].tolist()]

    train = corpus.dataset("train", vocabulary, **options)
    orders = [order(train) for _ in range(8)]
    assert len({tuple(o) for o in orders}) > 1
    assert len({tuple(sorted(o)) for o in orders}) == 1
    valid = corpus.dataset("train", vocabulary, shuffle=False, **options)
    assert order(valid) == order(valid)
    # The same seed gives the same orders again.
    assert order(corpus.dataset("train", vocabulary, **options)) == orders[0]


def test_sampled_directions_have_their_shares():
    many, few = ["a b c d"] * 900, ["e f"] * 100
    pairs = {"en-fr": (many, many), "en-ko": (few, few)}
    corpus = data.TranslationCorpus("made", {"train": pairs, "valid": {}, "test": {}})
    vocabulary = vocabulary_of(corpus, 40, byte_fallback=False)
    korean = vocabulary.language_ids(["ko"]).numpy()[0]
    counts = {}
    for temperature in (1.0, 2.0):
        batches = corpus.dataset(
            "train", vocabulary, batch_tokens=64, temperature=temperature
        )
        first = np.concatenate([source[:, 0] for (source, _), _ in batches])
        counts[temperature] = np.sum(first == korean)
        assert first.size == 1000
    assert counts[1.0] == 100
    # sqrt(100) / (sqrt(100) + sqrt(900)) = 1/4; standard deviation sqrt(1000*3/16) = 14
    assert abs(counts[2.0] - 250) < 5 * 14


def test_batches_keep_to_their_size():
    texts = [" ".join(["ab"] * n) for n in range(1, 60)] * 3
    pairs = {"en-fr": (texts, texts)}
    corpus = data.TranslationCorpus("made", {"train": pairs, "valid": {}, "test": {}})
    vocabulary = vocabulary_of(corpus, 20, byte_fallback=False)
    rows = 0
    for (source, inputs), _ in corpus.dataset(
        "train", vocabulary, batch_tokens=128, max_length=32
    ):
        assert source.shape[0] * max(source.shape[1], inputs.shape[1]) <= 128
        rows += source.shape[0]
    lengths = vocabulary.encode_source(texts, ["fr"] * len(texts)).row_lengths().numpy()
    assert rows == np.sum(lengths <= 32) < len(texts)


def test_errors(folder, tmp_path):
    load = data.load_translation_corpus
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="'train' file for direction='en-nl'"):
        load(folder, directions=["en-nl"])
    with pytest.raises(ValueError, match="direction='enfr'"):
        load(folder, directions=["enfr"])
    with pytest.raises(ValueError, match=r"directions=\[\]"):
        load(folder, directions=[])
    with pytest.raises(ValueError, match="'en-xx'"):
        load(directions=["en-xx"])
    corpus = load(folder)
    vocabulary = vocabulary_of(corpus)
    with pytest.raises(ValueError, match="split='dev'"):
        corpus.dataset("dev", vocabulary)
    (folder / "train.en-fr.tsv").write_text("one\ttwo\nthree\n")
    with pytest.raises(ValueError, match=r"'three' in line 2 of .*train\.en-fr\.tsv"):
        load(folder)
    (folder / "train.en-fr.tsv").write_bytes(b"caf\xe9\tx\n")
    with pytest.raises(ValueError, match="UTF-8"):
        load(folder)
    (folder / "train.en-fr.tsv").write_text("")
    with pytest.raises(ValueError, match="0 lines"):
        load(folder)
    for path in folder.glob("train*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no training file"):
        load(folder)
