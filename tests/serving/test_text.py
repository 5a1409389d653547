"""The graph's text is that of Python."""

import doctest

import numpy as np
import pytest
import tensorflow as tf

import keras_moe
from keras_moe import data
from keras_moe.data.vocabulary import RESERVED
from keras_moe.serving import TextCodec, text

ODD = [
    "",
    "\n",
    "a\n\nb\r\n",
    " I don't,\tMr. Bennet. ",
    "l’été, 日本 👩‍👧 ½",
    "<pad> <unk> <eos> a<eos>",
    "x" * 5000,
    "word " * 2000,
]


def python_ids(vocabulary, line, tokenizer):
    line = line[:-1] if line.endswith("\n") else line
    ids = []
    for part in line.removesuffix("\r").split("\n"):
        ids += [*vocabulary.encode(data.tokenize(part, tokenizer)), 2]
    return ids


@pytest.fixture(scope="module")
def austen():
    return data.load_text_corpus(min_count=2)


@pytest.mark.parametrize("tokenizer", data.TOKENIZERS)
def test_ids_are_those_of_python(austen, tokenizer):
    vocabulary = austen.vocabulary
    lines = [*ODD, vocabulary.to_text(austen.test[:3000])]
    codec = TextCodec(vocabulary, tokenizer)
    ids = tf.function(codec.encode)(tf.constant(lines)).to_list()
    assert ids == [python_ids(vocabulary, line, tokenizer) for line in lines]


PIECES = [
    *[
        "a",
        "B",
        "é",
        "e\u0301",
        "日",
        "👩‍👧",
        "ß",
        "ﬁ",
        "İ",
        "1",
        "½",
        "٣",
        "_",
        "-",
        "@-@",
    ],
    *["'", "’", "'s", "n't", ".", ",", '"', "<pad>", "<unk>", "<eos>", " ", "  ", "\t"],
    *[
        "\r",
        "\0",
        "\x0b",
        "\x7f",
        "\x85",
        "\u00a0",
        "\u200b",
        "\u2028",
        "\ufeff",
        "\ufffd",
    ],
    *["\ufdd0", "\ufdd1", "\uffff", "\U0010ffff"],
]


@pytest.mark.parametrize("tokenizer", data.TOKENIZERS)
def test_generated_strings_have_the_ids_and_text_of_the_vocabulary(tokenizer, rng):
    def text(length, *more):
        # As objects: an array of strings would drop a NUL.
        pieces = np.array([*PIECES, *more], object)
        return "".join(rng.choice(pieces, rng.integers(length)))

    for _ in range(3):
        lines = [text(30, "\n", "\r\n") for _ in range(100)] + ["", "a" * 9999]
        words = {"", " ", "a b", "\0", "a\0", "\ufdd0", *(text(5) for _ in range(20))}
        for line in lines[:20]:
            words |= set(data.tokenize(line, tokenizer)[:2])
        tokens = [*RESERVED, *sorted(words - set(RESERVED))]
        vocabulary = data.Vocabulary(tokens, [0] * len(tokens))
        codec = TextCodec(vocabulary, tokenizer)
        ids = tf.function(codec.encode)(tf.constant(lines)).to_list()
        assert ids == [python_ids(vocabulary, line, tokenizer) for line in lines]
        probes = [*tokens, "not in it", "A B", "\0\0", "e\u0301\u0301"]
        found = codec.table.lookup(tf.constant([probe.encode() for probe in probes]))
        np.testing.assert_array_equal(found, vocabulary.encode(probes))
        rows = [rng.integers(len(tokens), size=rng.integers(12)) for _ in range(50)]
        ragged = tf.ragged.constant([row.tolist() for row in rows], tf.int32)
        texts = tf.function(codec.decode)(ragged).numpy()
        assert [t.decode() for t in texts] == [vocabulary.to_text(row) for row in rows]


def test_generated_bytes_are_read_as_python_reads_them(austen, rng):
    parts = [
        b"a",
        b" ",
        b"\xff",
        b"\xc3",
        b"\xa9",
        b"\xe2\x82",
        b"\xed\xa0\x80",
        b"\xf0\x9f",
    ]
    texts = [b"".join(rng.choice(parts, rng.integers(9))) for _ in range(100)]
    found = TextCodec(austen.vocabulary).encode(texts).to_list()
    read = [text.decode(errors="replace") for text in texts]
    assert found == [python_ids(austen.vocabulary, line, "words") for line in read]


def test_text_is_that_of_python(austen):
    vocabulary = austen.vocabulary
    odd = [["``", '"', "a", '"', "b", '"', "<eos>", '"', "c", "<eos>", "<eos>"]]
    odd += [["do", "n't", "x", "@-@", "y", "(", "z", ")", "'s", "-", ","], []]
    vocabulary = data.Vocabulary.from_tokens(
        [vocabulary.tokens[3:], *[[t for t in row if t != "<eos>"] for row in odd]]
    )
    words = vocabulary.decode(vocabulary.encode(austen.vocabulary.decode(austen.test)))
    rows = [vocabulary.encode(row) for row in [*odd, words[:2000], words[2000:2100]]]
    rows.append(np.append(rows[-1], [0, 0]).astype("int32"))
    texts = TextCodec(vocabulary).decode(tf.ragged.constant([r.tolist() for r in rows]))
    expected = [vocabulary.to_text(row) for row in rows]
    assert [t.decode() for t in texts.numpy()] == expected


def test_bytes_that_are_no_text_are_unknown_characters(austen):
    codec = TextCodec(austen.vocabulary)
    found = codec.encode([b"to \xff\xfe be", b"\xc3"]).to_list()
    unknown = python_ids(austen.vocabulary, "to \ufffd\ufffd be", "words")
    assert found == [unknown, [1, 2]]


def test_tokens_are_named_and_padding_is_empty(austen):
    names = TextCodec(austen.vocabulary).tokens([[1, 2, 0]]).numpy().tolist()
    assert names == [[b"<unk>", b"<eos>", b""]]


def test_an_unknown_tokenizer_is_refused(austen):
    with pytest.raises(ValueError, match="tokenizer='bpe'"):
        TextCodec(austen.vocabulary, "bpe")


def test_docstring_example_runs():
    failed, tried = doctest.testmod(text, extraglobs={"keras_moe": keras_moe})
    assert tried >= 4
    assert failed == 0
