"""Text corpora: files, streams, batches, the embedded corpus."""

import doctest
import gzip
import lzma
import sys
import unicodedata
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe
from keras_moe.data import (
    WORD_PATTERN,
    TextCorpus,
    Vocabulary,
    load_text_corpus,
    text,
    tokenize,
    unigram_perplexity,
    vocabulary,
)

PAD, UNK, EOS = 0, 1, 2
SPLITS = ("train", "valid", "test")


def write(folder, train, valid="a\n", test="b\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, content in zip(SPLITS, (train, valid, test), strict=True):
        (folder / f"{split}.txt").write_text(content, encoding="utf-8", newline="")
    return folder


def corpus_of(ids):
    """A corpus whose splits are all the same stream."""
    ids = np.asarray(ids, np.int32)
    tokens = [str(i) for i in range(3, max(ids.max() + 1, 3))]
    known = Vocabulary(
        ["<pad>", "<unk>", "<eos>", *tokens], np.ones(3 + len(tokens), int)
    )
    return TextCorpus("tiny", "whitespace", known, ids, ids, ids)


def batches_of(corpus, *args):
    return [[x.numpy() for x in batch] for batch in corpus.dataset(*args)]


@pytest.fixture(scope="module")
def austen():
    return load_text_corpus()


# --- batches ---------------------------------------------------------------


def test_batches_of_a_tiny_stream_are_as_computed_by_hand():
    # 7 tokens in 2 rows: 4 and 3. Row 0 is 3 4 5 6, row 1 is 7 8 9.
    # ceil(4 / 3) = 2 batches of 3 steps.
    batches = batches_of(corpus_of([3, 4, 5, 6, 7, 8, 9]), "train", 2, 3)
    assert len(batches) == 2
    tokens, targets, weights = batches[0]
    # The first token of all is <eos>; row 1 begins with the end of row 0.
    np.testing.assert_array_equal(tokens, [[EOS, 3, 4], [6, 7, 8]])
    np.testing.assert_array_equal(targets, [[3, 4, 5], [7, 8, 9]])
    np.testing.assert_array_equal(weights, [[1, 1, 1], [1, 1, 1]])
    tokens, targets, weights = batches[1]
    np.testing.assert_array_equal(tokens, [[5, PAD, PAD], [PAD, PAD, PAD]])
    np.testing.assert_array_equal(targets, [[6, PAD, PAD], [PAD, PAD, PAD]])
    np.testing.assert_array_equal(weights, [[1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("size", "batch_size", "sequence_length"),
    [
        (1, 1, 1),
        (5, 5, 4),  # one token a row
        (6, 5, 1),
        (12, 3, 4),  # nothing to fill up
        (13, 3, 4),
        (31, 4, 3),  # several batches, some rows shorter
        (31, 3, 50),
    ],
)
def test_every_token_is_a_target_once_and_follows_its_input(
    size, batch_size, sequence_length
):
    ids = np.arange(3, 3 + size)
    corpus = corpus_of(ids)
    batches = batches_of(corpus, "valid", batch_size, sequence_length)
    steps = corpus.num_steps("valid", batch_size, sequence_length)
    assert len(batches) == steps
    assert steps == len(corpus.dataset("valid", batch_size, sequence_length))
    # Rows go on from batch to batch: joined along time they are the stream.
    tokens, targets, weights = (
        np.concatenate(x, 1) for x in zip(*batches, strict=True)
    )
    real = weights == 1
    assert weights.sum() == size
    np.testing.assert_array_equal(targets[real], ids)
    np.testing.assert_array_equal(tokens[real], [EOS, *ids[:-1]])
    # All else is padding, at the ends of the rows.
    assert not tokens[~real].any()
    assert not targets[~real].any()
    assert set(np.unique(weights)) <= {0.0, 1.0}
    assert (np.diff(weights, axis=1) <= 0).all()
    lengths = weights.sum(1)
    assert lengths.min() >= 1
    assert lengths.max() - lengths.min() <= 1


def test_dataset_has_static_shapes_types_and_a_known_cardinality():
    data = corpus_of(np.arange(3, 24)).dataset("test", 2, 5)
    assert [spec.shape.as_list() for spec in data.element_spec] == [[2, 5]] * 3
    assert [spec.dtype for spec in data.element_spec] == [
        tf.int32,
        tf.int32,
        tf.float32,
    ]
    # ceil(21 / 2) = 11 tokens in the longest row, ceil(11 / 5) = 3 batches.
    assert data.cardinality().numpy() == 3


def test_dataset_is_the_same_every_time(austen):
    data = austen.dataset("test", 4, 35)
    for first, second, other in zip(
        data, data, austen.dataset("test", 4, 35), strict=True
    ):
        for x, y, z in zip(first, second, other, strict=True):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(x, z)


def test_keras_counts_every_token_once():
    # A model that always says 1 for class 3: the weighted accuracy is the
    # fraction of 3s among the tokens, 2 of 5, whatever the padding.
    corpus = corpus_of([3, 4, 3, 5, 6])
    model = keras.Sequential(
        [keras.layers.Lambda(lambda x: keras.ops.one_hot(x * 0 + 3, 7))]
    )
    model.compile(
        loss="sparse_categorical_crossentropy",
        weighted_metrics=["sparse_categorical_accuracy"],
    )
    logs = model.evaluate(corpus.dataset("test", 2, 2), verbose=0, return_dict=True)
    assert logs["sparse_categorical_accuracy"] == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", 0, 2), r"`batch_size` .* at least 1.*batch_size=0"),
        (("train", 2.0, 2), r"`batch_size` must be a whole number.*batch_size=2.0"),
        (("train", True, 2), r"`batch_size` must be a whole number.*batch_size=True"),
        (("train", 2, 0), r"`sequence_length` .* at least 1.*sequence_length=0"),
        (("dev", 2, 2), r"`split` must be one of .*'valid'.*split='dev'"),
        (("train", 4, 2), r"batch_size=4, 3 tokens.*Lower `batch_size`"),
    ],
)
def test_wrong_sizes_are_refused(arguments, message):
    corpus = corpus_of([3, 4, 5])
    with pytest.raises(ValueError, match=message):
        corpus.dataset(*arguments)
    with pytest.raises(ValueError, match=message):
        corpus.num_steps(*arguments)


# --- reading ---------------------------------------------------------------


def test_every_line_ends_with_eos_and_the_vocabulary_is_that_of_train(tmp_path):
    corpus = load_text_corpus(write(tmp_path / "tiny", "a b a\nb a\n", "c a\n", "b"))
    # a 3 times, b twice: ids 3 and 4; c is not in train.
    assert corpus.vocabulary.tokens == ["<pad>", "<unk>", "<eos>", "a", "b"]
    assert corpus.vocabulary.counts.tolist() == [0, 0, 2, 3, 2]
    assert corpus.train.tolist() == [3, 4, 3, EOS, 4, 3, EOS]
    assert corpus.valid.tolist() == [UNK, 3, EOS]
    assert corpus.test.tolist() == [4, EOS]
    assert {corpus.stream(split).dtype for split in SPLITS} == {np.dtype(np.int32)}
    assert (corpus.name, corpus.tokenizer) == ("tiny", "whitespace")


def test_blank_lines_count_for_whitespace_only(tmp_path):
    folder = write(tmp_path, "\na b\n \nb\n")
    # Sorted by count: b, a.
    corpus = load_text_corpus(folder)
    assert corpus.train.tolist() == [EOS, 4, 3, EOS, EOS, 3, EOS]
    assert corpus.vocabulary.counts.tolist() == [0, 0, 4, 2, 1]
    corpus = load_text_corpus(folder, tokenizer="words")
    assert corpus.train.tolist() == [4, 3, EOS, 3, EOS]
    assert corpus.vocabulary.counts.tolist() == [0, 0, 2, 2, 1]


def test_literal_reserved_tokens_have_reserved_ids_but_pad_is_unknown(tmp_path):
    corpus = load_text_corpus(write(tmp_path, "<unk> a <eos> <pad>\n"))
    assert corpus.train.tolist() == [UNK, 3, EOS, UNK, EOS]
    # <unk> and <pad> count as unknown; the line and <eos> as <eos>.
    assert corpus.vocabulary.counts.tolist() == [0, 2, 2, 1]


def test_plain_gz_and_xz_files_are_equal(tmp_path):
    train = "Öl – a b\nb 猫\r\n\n"
    plain = write(tmp_path / "plain", train)
    for suffix, module in (("gz", gzip), ("xz", lzma)):
        packed = tmp_path / suffix
        packed.mkdir()
        for split in SPLITS:
            content = (plain / f"{split}.txt").read_bytes()
            with module.open(packed / f"{split}.txt.{suffix}", "wb") as file:
                file.write(content)
        expected, found = load_text_corpus(plain), load_text_corpus(str(packed))
        assert expected.vocabulary == found.vocabulary
        for split in SPLITS:
            np.testing.assert_array_equal(expected.stream(split), found.stream(split))
    # b twice; then a, Öl, – and 猫 by code point. 2 + 3 lines' ends.
    assert expected.vocabulary.tokens[3:] == ["b", "a", "Öl", "–", "猫"]
    assert expected.train.size == 4 + 2 + 3


def test_a_byte_order_mark_is_no_token(tmp_path):
    assert load_text_corpus(write(tmp_path, "\ufeffa\na\n")).vocabulary.tokens[3:] == [
        "a"
    ]


def test_a_training_text_of_one_line_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2 lines.*1 line of 5 tokens"):
        load_text_corpus(write(tmp_path, "a b c d e"))


def test_vocabulary_size_and_min_count_make_words_unknown(tmp_path):
    folder = write(tmp_path, "a a a b\nb c\n")
    corpus = load_text_corpus(folder, vocabulary_size=4)
    assert corpus.vocabulary.tokens[3:] == ["a"]
    assert corpus.train.tolist() == [3, 3, 3, UNK, EOS, UNK, UNK, EOS]
    corpus = load_text_corpus(folder, min_count=2)
    assert corpus.vocabulary.tokens[3:] == ["a", "b"]
    assert corpus.vocabulary.counts.tolist() == [0, 1, 2, 3, 2]


def test_a_given_vocabulary_is_used_as_it_is(tmp_path):
    known = Vocabulary.from_tokens([["z", "b"]])
    corpus = load_text_corpus(write(tmp_path, "a b\na\n"), vocabulary=known)
    assert corpus.vocabulary is known
    assert corpus.train.tolist() == [UNK, 3, EOS, UNK, EOS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "bpe"}, r"`tokenizer` must be one of .*tokenizer='bpe'"),
        ({"min_count": 0}, r"`min_count` .* at least 1.*min_count=0"),
        ({"vocabulary_size": 3}, r"`vocabulary_size` .* at least 4.*vocabulary_size=3"),
    ],
)
def test_wrong_arguments_are_refused_before_reading(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_text_corpus("no_such_folder", **arguments)


def test_a_missing_folder_is_named(tmp_path):
    message = r"`data_dir` must be a folder.*data_dir='.*nowhere'.*does not exist"
    with pytest.raises(FileNotFoundError, match=message):
        load_text_corpus(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"file', which is a file"):
        load_text_corpus(tmp_path / "file")


def test_a_missing_file_is_named_with_all_its_forms(tmp_path):
    (write(tmp_path, "a\n") / "valid.txt").unlink()
    message = (
        r"`data_dir` has no 'valid' file.*looked for valid\.txt, valid\.txt\.gz, "
        r"valid\.txt\.xz"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_text_corpus(tmp_path)


def test_two_forms_of_a_file_are_refused(tmp_path):
    (write(tmp_path, "a\n") / "test.txt.gz").touch()
    message = r"2 forms of the 'test' file.*test\.txt, test\.txt\.gz"
    with pytest.raises(ValueError, match=message):
        load_text_corpus(tmp_path)


@pytest.mark.parametrize(("content", "lines"), [("", 0), ("\n \n", 2)])
@pytest.mark.parametrize("tokenizer", ["words", "whitespace"])
def test_a_file_without_tokens_is_refused(tmp_path, content, lines, tokenizer):
    for split in SPLITS:
        (write(tmp_path, "a\n") / f"{split}.txt").write_text(content)
        with pytest.raises(ValueError, match=rf"{split}\.txt, {lines} lines, 0 tokens"):
            load_text_corpus(tmp_path, tokenizer=tokenizer)


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    (write(tmp_path, "a\n") / "valid.txt").write_bytes(b"good\n\nb\xe9b\ngood\n")
    with pytest.raises(ValueError, match=r"must be UTF-8.*valid\.txt, line 3: .*0xe9"):
        load_text_corpus(tmp_path)


@pytest.mark.parametrize(("suffix", "module"), [("gz", gzip), ("xz", lzma)])
@pytest.mark.parametrize("damage", ["truncated", "another format", "a wrong byte"])
def test_a_damaged_file_is_named(tmp_path, suffix, module, damage):
    (write(tmp_path, "a\n") / "train.txt").unlink()
    rng = np.random.default_rng(0)
    content = "".join(f"{i}\n" for i in rng.integers(0, 10**9, 5000)).encode()
    packed = bytearray(module.compress(content))
    if damage == "truncated":
        del packed[len(packed) // 2 :]
    elif damage == "a wrong byte":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed = bytearray(content)
    (tmp_path / f"train.txt.{suffix}").write_bytes(packed)
    message = rf"train\.txt\.{suffix} could not be read after line \d+: .*make it again"
    with pytest.raises(ValueError, match=message):
        load_text_corpus(tmp_path)


# --- the embedded corpus ---------------------------------------------------


def test_embedded_corpus_has_the_documented_counts(austen):
    # Tokens and one <eos> a line: 349,638 + 4,370; 20,301 + 242; 16,296 + 267.
    sizes = {split: austen.stream(split).size for split in SPLITS}
    assert sizes == {"train": 354_008, "valid": 20_543, "test": 16_563}
    lines = [int((austen.stream(split) == EOS).sum()) for split in SPLITS]
    assert lines == [4370, 242, 267]
    unknown = [int((austen.stream(split) == UNK).sum()) for split in SPLITS]
    assert unknown == [0, 295, 124]
    assert len(austen.vocabulary) == 10_296 + 3
    assert (austen.name, austen.tokenizer) == ("austen", "words")
    assert not any((austen.stream(split) == PAD).any() for split in SPLITS)


def test_embedded_corpus_with_min_count_two():
    corpus = load_text_corpus(min_count=2)
    assert len(corpus.vocabulary) == 6_505 + 3
    # 10,296 - 6,505 words occur once.
    assert corpus.vocabulary.counts[UNK] == 3_791
    assert (corpus.train == UNK).sum() == 3_791


def test_counts_of_the_embedded_vocabulary_are_those_of_the_stream(austen):
    counts = np.bincount(austen.train, minlength=len(austen.vocabulary))
    np.testing.assert_array_equal(austen.vocabulary.counts, counts)


def test_embedded_corpus_is_the_same_every_time(austen):
    again = load_text_corpus()
    assert again.vocabulary == austen.vocabulary
    for split in SPLITS:
        np.testing.assert_array_equal(again.stream(split), austen.stream(split))


@pytest.mark.parametrize("module", [text, vocabulary])
def test_docstring_examples_run(module):
    names = {"keras_moe": keras_moe, "np": np, "tf": tf, "keras": keras}
    failed, tried = doctest.testmod(module, extraglobs=names)
    assert tried >= 3
    assert failed == 0


# --- tokenizers ------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("I don't, at ten o'clock.", ["I", "don't", ",", "at", "ten", "o'clock", "."]),
        ("l’été n’est pas", ["l’été", "n’est", "pas"]),
        ("'tis boys' --a", ["'", "tis", "boys", "'", "-", "-", "a"]),
        ("1,000.5 in 1813.", ["1,000.5", "in", "1813", "."]),
        ("Ab_c<unk>", ["Ab", "_", "c", "<", "unk", ">"]),
        ("\u00a0 \t\r\n", []),
    ],
)
def test_words_are_found_in_raw_text(line, expected):
    assert tokenize(line, "words") == expected


def test_whitespace_keeps_tokens_as_they_are():
    assert tokenize(" don't <unk>\u00a0@-@ .\n", "whitespace") == [
        "don't",
        "<unk>",
        "@-@",
        ".",
    ]


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"one of \('words', 'whitespace'\).*'bpe'"):
        tokenize("a", "bpe")


def tokenize_in_graph(lines):
    """The same with RE2, in a graph. No token holds a line feed."""

    @tf.function
    def mark(lines):
        return tf.strings.regex_replace(lines, f"({WORD_PATTERN})", "\n\\1\n")

    marked = [line.decode() for line in mark(tf.constant(lines)).numpy()]
    return [[x for x in line.split("\n") if x and not x.isspace()] for line in marked]


def test_word_pattern_gives_the_same_tokens_in_a_graph(austen):
    words = austen.vocabulary.tokens[3:]
    odd = ["", "a''b", "'a", "a'", "1.", "1.a", "1,2,,3.4", "x\x1cy\x85z\u2028w", "½²Ⅷ"]
    odd += [
        "don't n’est l’é'é’ ’’a 1'a",
        "e\u0301",
        "한국어 日本語",
        "👩‍👩‍👧 €5",
        "a\x00b",
        "٣٫١٤ ١٫٢ १.२",
    ]
    lines = [*odd, " ".join(words[:500]), "".join(words[500:1000])]
    assert tokenize_in_graph(lines) == [tokenize(line, "words") for line in lines]


def test_word_pattern_agrees_on_every_character_of_unicode():
    # Characters that Python does not know yet, or that mean nothing, are left out.
    known = [
        chr(i)
        for i in range(sys.maxunicode + 1)
        if unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs")
    ]
    for start in range(0, len(known), 50_000):
        chunk = known[start : start + 50_000]
        line = "".join(f"a{c}1 " for c in chunk)
        [found] = tokenize_in_graph([line])
        assert found == tokenize(line, "words")


# --- vocabulary ------------------------------------------------------------


def test_ids_go_by_count_and_ties_by_the_alphabet():
    # d three times, b and c twice, a once: ids 3, 4, 5, 6.
    known = Vocabulary.from_tokens([["d", "c", "b", "d"], ["a", "b", "c", "d"], []])
    assert known.tokens[3:] == ["d", "b", "c", "a"]
    assert known.counts.tolist() == [0, 0, 3, 3, 2, 2, 1]
    assert known.counts.dtype == np.int64
    assert len(known) == 7
    assert known.encode(["a", "x", "<pad>", "<unk>", "<eos>"]).tolist() == [
        6,
        1,
        1,
        1,
        2,
    ]
    assert known.encode([]).dtype == np.int32
    assert known.decode(np.array([0, 2, 3])) == ["<pad>", "<eos>", "d"]


def test_a_counter_gives_the_same_vocabulary():
    lines = [["d", "c", "b", "<unk>"], ["b", "<pad>", "<eos>"]]
    counter = Counter({"d": 1, "c": 1, "b": 2, "<unk>": 1, "<pad>": 1, "<eos>": 3})
    for limits in ({}, {"min_count": 2}, {"max_size": 5}):
        expected = Vocabulary.from_tokens(lines, **limits)
        assert Vocabulary.from_tokens(counter, **limits) == expected
    assert expected.tokens[3:] == ["b", "c"]
    assert expected.counts.tolist() == [0, 3, 3, 2, 1]  # d, <unk>, <pad> are unknown


def test_saved_vocabularies_come_back_equal(tmp_path, austen):
    odd = ["", " ", "\t", "a\t3", "\r", "\x0b\x0c\x1c\x85\u2028", "\\n", "\ufeff", "é"]
    odd += ["e\u0301", "👩‍👩‍👧", "\x00", "\ud800", '"', "#", "名前"]
    for known in (Vocabulary.from_tokens([odd, ["é"]]), austen.vocabulary):
        known.save(tmp_path / "v.tsv")
        again = Vocabulary.load(str(tmp_path / "v.tsv"))
        assert again == known
        assert again.tokens == known.tokens
        np.testing.assert_array_equal(again.encode(odd), known.encode(odd))
    assert (
        (tmp_path / "v.tsv")
        .read_bytes()
        .startswith(b"<pad>\t0\n<unk>\t0\n<eos>\t4370\n,\t23610\n")
    )
    assert known != Vocabulary(known.tokens, known.counts + 1)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("a , b ; c . <eos> <eos> d <pad>", "a, b; c.\n\nd"),
        ('" Well , " said he ; " go ! "', '"Well," said he; "go!"'),
        ('" open <eos> " next "', '"open\n"next"'),
        ("“ Oui ” ( non ) [ 1 ]", "“Oui” (non) [1]"),
        ("good - humoured - - no", "good-humoured--no"),
        ("he did n't , it 's 25 @,@ 000 @-@ odd", "he didn't, it's 25,000-odd"),
        ("the boys ’ <unk>", "the boys’ <unk>"),
    ],
)
def test_text_is_readable(tokens, expected):
    known = Vocabulary.from_tokens([tokens.split()])
    ids = [
        PAD if token == "<pad>" else known.encode([token])[0]
        for token in tokens.split()
    ]
    assert known.to_text(ids) == expected


def test_unigram_perplexity_equals_a_direct_computation(tmp_path):
    corpus = load_text_corpus(write(tmp_path, "a a\nb\n", test="a c b\n"))
    # Counts: <unk> 0, <eos> 2, a 2, b 1; with one added 1, 3, 3, 2 of 9.
    log_probs = corpus.vocabulary.unigram_log_probs()
    assert log_probs.dtype == np.float64
    np.testing.assert_allclose(log_probs[1:], np.log([1 / 9, 3 / 9, 3 / 9, 2 / 9]))
    assert log_probs[0] == -np.inf
    # The test text is a <unk> b <eos>.
    product = (3 / 9) * (1 / 9) * (2 / 9) * (3 / 9)
    found = unigram_perplexity(corpus.vocabulary, corpus.test)
    assert found == pytest.approx(product ** (-1 / 4), rel=1e-12)


def test_unigram_perplexity_of_the_embedded_corpus(austen):
    probs = np.bincount(austen.train, minlength=len(austen.vocabulary)) + 1.0
    probs[0] = 0
    probs /= probs.sum()
    counts = np.bincount(austen.test, minlength=probs.size)
    seen = counts > 0
    expected = np.exp(-(counts[seen] * np.log(probs[seen])).sum() / counts.sum())
    found = unigram_perplexity(austen.vocabulary, austen.test)
    assert found == pytest.approx(expected, rel=1e-12)
    assert np.exp(austen.vocabulary.unigram_log_probs()).sum() == pytest.approx(1.0)


RESERVED = ["<pad>", "<unk>", "<eos>"]
TINY = Vocabulary(RESERVED, [0, 0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Vocabulary(["a"], [1]), r"begin with .*Received: \['a'\]"),
        (lambda: Vocabulary(RESERVED, [1]), r"3 tokens, 1 counts"),
        (lambda: Vocabulary(RESERVED, [0, -2, 0]), r"a count of -2 for '<unk>'"),
        (lambda: Vocabulary([*RESERVED, "a", "a"], [0] * 5), r"once: \['a'\]"),
        (lambda: Vocabulary([*RESERVED, "a\n"], [0] * 4), r"line feed"),
        (lambda: Vocabulary.from_tokens([], min_count=0), r"`min_count` .*=0"),
        (lambda: Vocabulary.from_tokens([], max_size=3), r"least 4.*max_size=3"),
        (lambda: Vocabulary.from_tokens(["ab"]), r"`tokens` .* not text.*'ab'"),
        (lambda: TINY.encode("ab"), r"`tokens` .* not text.*'ab'"),
        (lambda: TINY.decode([1, 3]), r"`ids` .*\[0, 3\).*from 1 to 3"),
        (lambda: TINY.decode([-1]), r"`ids` .*\[0, 3\).*from -1 to -1"),
        (lambda: TINY.to_text([[1, 2]]), r"`ids` .* one dimension.*\(1, 2\)"),
        (lambda: unigram_perplexity(TINY, [0, 2]), r"\[1, 3\).*from 0 to 2"),
        (lambda: unigram_perplexity(TINY, []), r"at least one token.*0 tokens"),
    ],
)
def test_wrong_vocabularies_tokens_and_ids_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("line", ["a", "a 1", "a\t", "a\t-1", "a\t²"])
def test_a_file_that_is_no_vocabulary_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "v.tsv"
    path.write_text(f"<pad>\t0\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"token<TAB>count.* in line 2 of .*v\.tsv"):
        Vocabulary.load(path)
