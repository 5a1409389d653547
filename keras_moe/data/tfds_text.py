"""Sentences of tensorflow-datasets as streams of tokens: lm1b."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.pipelines import prefetched
from keras_moe.data.text import TextCorpus
from keras_moe.data.vocabulary import EOS, EOS_ID, Vocabulary

# Sentences that are split and looked up at a time.
_CHUNK = 512
_PARALLEL_CALLS = 4


@dataclass(frozen=True, eq=False)
class StreamedCorpus(TextCorpus):
    """A corpus whose training text is read from its files again in every pass.

    Validation and test text are held in memory, as in a `TextCorpus`; the training
    text, which may have a billion words, is not.

    Args:
        name: Str. Name of the corpus.
        tokenizer: `"whitespace"`.
        vocabulary: `Vocabulary`, learnt from the training text.
        train: `(0,)` int32: not held.
        valid: `(n,)` int32; every sentence ends with `<eos>`.
        test: Likewise.
        sentences: Function of `num_shards` and `shard_index` that gives a
            `tf.data.Dataset` of training sentences, scalar strings.
        num_train_tokens: Int. Tokens of the training text, `<eos>` included.
    """

    sentences: Callable[[int, int], tf.data.Dataset]
    num_train_tokens: int

    def num_tokens(self, split: str) -> int:
        return self.num_train_tokens if split == "train" else super().num_tokens(split)

    def dataset(
        self,
        split: str,
        batch_size: int,
        sequence_length: int,
        *,
        num_shards: int = 1,
        shard_index: int = 0,
    ) -> tf.data.Dataset:
        """Batches for a model that carries its state from one to the next.

        As `TextCorpus.dataset` for validation and test text. Training sentences
        are dealt to the row that is shortest so far, so each row is a stream of
        whole sentences. Every token is a target once; what fills up the rows at
        the end is padding of weight 0. The number of batches is not known before.

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            batch_size: Int, B. Rows of a batch.
            sequence_length: Int, T. Time steps of a batch.
            num_shards: Int. Workers that share the training sentences evenly.
                Defaults to `1`.
            shard_index: Int. Which of them reads here. Defaults to `0`.

        Returns:
            A `tf.data.Dataset` of `(tokens, targets, sample_weight)`, each `(B, T)`,
            prefetched.

        Raises:
            ValueError: A size is below 1, or `shard_index` is not below
                `num_shards`.
        """
        if split != "train":
            return super().dataset(split, batch_size, sequence_length)
        checks.verify_int(batch_size, "batch_size", 1)
        checks.verify_int(sequence_length, "sequence_length", 1)
        checks.verify_int(num_shards, "num_shards", 1)
        checks.verify_int(shard_index, "shard_index", 0)
        if shard_index >= num_shards:
            raise ValueError(
                "`shard_index` must be below `num_shards`. Received: "
                f"shard_index={shard_index}, num_shards={num_shards}."
            )
        with tf.device("CPU"):
            table = _table(self.vocabulary)

        def ids(sentences):
            found = table.lookup(tf.strings.split(sentences))
            return found.flat_values, found.row_lengths()

        chunks = prefetched(
            self.sentences(num_shards, shard_index)
            .batch(_CHUNK)
            .map(ids, num_parallel_calls=_PARALLEL_CALLS)
        )
        shape = (batch_size, sequence_length)
        data = tf.data.Dataset.from_generator(
            lambda: _deal(chunks.as_numpy_iterator(), *shape),
            output_signature=(
                tf.TensorSpec(shape, tf.int32),
                tf.TensorSpec(shape, tf.int32),
                tf.TensorSpec(shape, tf.float32),
            ),
        )
        return prefetched(data)


def _table(vocabulary: Vocabulary) -> tf.lookup.StaticHashTable:
    """From words to ids; unknown words, and a literal `<pad>`, are `<unk>`."""
    ids: np.ndarray = np.arange(len(vocabulary), dtype=np.int32)
    words = tf.constant([t.encode("utf-8", "surrogatepass") for t in vocabulary.tokens])
    unknown = int(vocabulary.encode(["\n"])[0])  # no token has a line feed
    return tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(words[1:], ids[1:]), unknown
    )


def _deal(chunks: Iterator, batch_size: int, sequence_length: int) -> Iterator:
    """Deals sentences to rows and cuts the rows into batches."""
    rows: list[list[np.ndarray]] = [[] for _ in range(batch_size)]
    lengths: np.ndarray = np.zeros(batch_size, np.int64)
    last: np.ndarray = np.full(batch_size, EOS_ID, np.int32)
    end: np.ndarray = np.array([EOS_ID], np.int32)

    def cut():
        nonlocal last
        targets: np.ndarray = np.zeros((batch_size, sequence_length), np.int32)
        weights: np.ndarray = np.zeros((batch_size, sequence_length), np.float32)
        for number, row in enumerate(rows):
            text = np.concatenate(row) if row else end[:0]
            own, rows[number] = text[:sequence_length], [text[sequence_length:]]
            targets[number, : own.size] = own
            weights[number, : own.size] = 1.0
        tokens = np.concatenate([last[:, np.newaxis], targets[:, :-1]], axis=1)
        last = targets[:, -1].copy()
        np.maximum(lengths - sequence_length, 0, out=lengths)
        return np.where(weights > 0, tokens, 0).astype(np.int32), targets, weights

    for ids, sizes in chunks:
        for sentence in np.split(ids, np.cumsum(sizes)[:-1]):
            shortest = int(np.argmin(lengths))
            rows[shortest] += [sentence, end]
            lengths[shortest] += sentence.size + 1
            if lengths.min() >= sequence_length:
                yield cut()
    while lengths.max() > 0:
        yield cut()


def load_tfds_text(
    name: str = "lm1b",
    *,
    data_dir: str | Path | None = None,
    min_count: int = 3,
    vocabulary_size: int | None = None,
    vocabulary: Vocabulary | None = None,
    valid_split: str = "test[:2%]",
    test_split: str = "test[2%:4%]",
) -> StreamedCorpus:
    """Reads a dataset of sentences that tensorflow-datasets has prepared.

    The 1-billion-word benchmark (`"lm1b"`) is tokenized already: words stand between
    blanks. Its vocabulary of 793,471 words is that of all words that occur three
    times or more in the training text, with the three marks for unknown words and
    sentence ends; here `<pad>`, `<unk>` and `<eos>`. Sentences are independent of
    each other and shuffled.

    The builder has one held-out split, of 50 files. The usual test set is the first
    file, which cannot be told from the others once the builder has shuffled them:
    parts of that size (2 %) are taken here.

    Args:
        name: Str. Name of the dataset. Defaults to `"lm1b"`.
        data_dir: Str, path or None. Where tensorflow-datasets keeps its data; None
            is its default. Defaults to `None`.
        min_count: Int. Words that occur less often in the training text become
            `<unk>`. Defaults to `3`.
        vocabulary_size: Int or None. Most ids. Defaults to `None`: no limit.
        vocabulary: A `Vocabulary`, for instance that of an earlier run, which saves
            a pass over the training text. Defaults to `None`: learnt from it.
        valid_split: Str. What of the dataset is validation text, in the notation of
            tensorflow-datasets. Defaults to `"test[:2%]"`.
        test_split: Str. What is test text. Defaults to `"test[2%:4%]"`.

    Returns:
        A `StreamedCorpus`.

    Raises:
        FileNotFoundError: The dataset is not prepared in `data_dir`.
        ImportError: tensorflow-datasets is not installed.
        ValueError: A split has no sentences; `min_count` is below 1.

    Reference:
        Chelba et al. 2013; Shazeer et al. 2017, appendix C.
    """
    tfds = _tfds()
    checks.verify_int(min_count, "min_count", 1)
    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)

    def read(split: Any) -> tf.data.Dataset:
        try:
            rows = builder.as_dataset(split=split, shuffle_files=False)
        except (AssertionError, ValueError) as error:
            raise FileNotFoundError(
                f"`data_dir` must hold the prepared dataset. Received: name={name!r}, "
                f"data_dir={str(data_dir)!r}, split {split!r}: {error} Prepare it with "
                "keras_moe.data.prepare_lm1b."
            ) from error
        return rows.map(lambda row: row["text"])

    def shard(num_shards: int, index: int) -> tf.data.Dataset:
        split = "train"
        if num_shards > 1:
            split = tfds.even_splits("train", num_shards, drop_remainder=False)[index]
        return read(split)

    if vocabulary is None:
        vocabulary = Vocabulary.from_tokens(
            _counted(read("train")), max_size=vocabulary_size, min_count=min_count
        )
        num_tokens = int(vocabulary.counts.sum())
    else:
        num_tokens = sum(_counted(read("train")).values())
    held = {}
    for part, split in (("valid", valid_split), ("test", test_split)):
        words = [w for line in _lines(read(split)) for w in (*line, EOS)]
        if not words:
            raise ValueError(
                f"`{part}_split` must have sentences. Received: "
                f"{part}_split={split!r} of {name!r}, which has none."
            )
        held[part] = vocabulary.encode(words)
    return StreamedCorpus(
        name,
        "whitespace",
        vocabulary,
        train=np.zeros(0, np.int32),
        **held,
        sentences=shard,
        num_train_tokens=num_tokens,
    )


def _lines(sentences: tf.data.Dataset) -> Iterator[list[str]]:
    for sentence in sentences.as_numpy_iterator():
        yield sentence.decode().split()


def _counted(sentences: tf.data.Dataset) -> Counter:
    counter: Counter[str] = Counter()
    for line in _lines(sentences):
        counter.update(line)
        counter[EOS] += 1
    return counter


def prepare_lm1b(
    archive: str | Path | None = None, *, data_dir: str | Path | None = None
) -> None:
    """Prepares the 1-billion-word benchmark with its builder.

    Args:
        archive: Str, path or None. The archive, if it has been fetched already
            (1-billion-word-language-modeling-benchmark-r13output.tar.gz). The
            builder compares its checksum with the one that it knows. None downloads
            it. Defaults to `None`.
        data_dir: Str, path or None. Where to write; None is the default of
            tensorflow-datasets. Defaults to `None`.

    Raises:
        FileNotFoundError: `archive` is no file.
        ValueError: `archive` has another name than the original.
        ImportError: tensorflow-datasets is not installed.
        tensorflow_datasets.download.NonMatchingChecksumError: The archive is another
            one, or damaged.
    """
    tfds = _tfds()
    builder = tfds.builder("lm1b", data_dir=data_dir, try_gcs=False)
    options: dict[str, Any] = {"try_download_gcs": False}
    if archive is not None:
        path = Path(archive)
        if not path.is_file():
            raise FileNotFoundError(
                f"`archive` must be a file. Received: archive={str(archive)!r}."
            )
        (expected,) = (info.filename for info in builder.url_infos.values())
        if path.name != expected:
            raise ValueError(
                f"`archive` must be called {expected}, by which the builder finds it. "
                f"Received: archive={str(archive)!r}. Rename it."
            )
        options["manual_dir"] = path.parent
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(**options)
    )


def _tfds() -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "Reading tensorflow-datasets needs that package. Install "
            "keras-moe[translation]."
        ) from error
    return tfds
