"""Text corpora as streams of tokens, in batches that go on where the last ended."""

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.files import read_lines, suffixes
from keras_moe.data.pipelines import prefetched
from keras_moe.data.vocabulary import (
    EOS,
    EOS_ID,
    RESERVED,
    Vocabulary,
    tokenize,
)

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class TextCorpus:
    """Three streams of token ids over one vocabulary.

    Args:
        name: Str. Name of the corpus.
        tokenizer: Str. How the text was split, see `tokenize`.
        vocabulary: `Vocabulary`, learnt from the training text.
        train: `(n,)` int32, the training text; every line ends with `<eos>`.
        valid: Likewise, the validation text.
        test: Likewise, the test text.

    Example:

    >>> corpus = keras_moe.data.load_text_corpus()
    >>> corpus.vocabulary.to_text(corpus.train[78:90])
    '"My dear Mr. Bennet," said his lady to'
    >>> corpus.num_steps("test", batch_size=8, sequence_length=35)
    60
    >>> corpus.dataset("test", batch_size=8, sequence_length=35).element_spec[0].shape
    TensorShape([8, 35])
    """

    name: str
    tokenizer: str
    vocabulary: Vocabulary
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def stream(self, split: str) -> np.ndarray:
        """The ids of a split.

        Args:
            split: `"train"`, `"valid"` or `"test"`.

        Returns:
            `(n,)` int32.

        Raises:
            ValueError: `split` is none of the three.
        """
        checks.verify_choice(split, "split", SPLITS)
        return getattr(self, split)

    def num_tokens(self, split: str) -> int:
        """Number of tokens of a split.

        Args:
            split: `"train"`, `"valid"` or `"test"`.

        Returns:
            Int, `<eos>` included.
        """
        return self.stream(split).size

    def num_steps(self, split: str, batch_size: int, sequence_length: int) -> int:
        """Number of batches of `dataset(split, batch_size, sequence_length)`.

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            batch_size: Int, B. Rows of a batch.
            sequence_length: Int, T. Time steps of a batch.

        Returns:
            `ceil(ceil(n / B) / T)` for a split of n tokens.

        Raises:
            ValueError: A size is below 1, or a row would be empty.
        """
        checks.verify_int(batch_size, "batch_size", 1)
        # A batch is held in memory, with the padding at its end.
        checks.verify_int(sequence_length, "sequence_length", 1, 2**28 // batch_size)
        size = self.stream(split).size
        if size < batch_size:
            raise ValueError(
                f"Every row of a batch needs at least one token of the {split!r} split "
                f"of {self.name!r}. Received: batch_size={batch_size}, {size} tokens. "
                "Lower `batch_size`."
            )
        per_row = -(-size // batch_size)
        return -(-per_row // sequence_length)

    def dataset(
        self, split: str, batch_size: int, sequence_length: int
    ) -> tf.data.Dataset:
        """Batches for a model that carries its state from one to the next.

        The stream is cut into `batch_size` contiguous rows whose lengths differ
        by one token at most. Row b of a batch goes on where row b of the batch
        before ended. Every token of the split is a target exactly once: none is
        lost and none counted twice, so that the weights sum to the number of
        tokens. What fills up the end of a row is padding: input 0, target 0,
        weight 0. The order is always the same.

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            batch_size: Int, B. Rows of a batch.
            sequence_length: Int, T. Time steps of a batch.

        Returns:
            A `tf.data.Dataset` of `(tokens, targets, sample_weight)`: int32,
            int32 and float32, each of the static shape `(B, T)`. A token is the
            one before its target in the stream, `<eos>` before the first of the
            split.

        Raises:
            ValueError: A size is below 1, or a row would be empty.
        """
        steps = self.num_steps(split, batch_size, sequence_length)
        with tf.device("CPU"):
            rows, lengths = _cut_into_rows(
                self.stream(split), batch_size, steps * sequence_length
            )

        def batch(step):
            start = step * sequence_length
            window = tf.slice(rows, [0, start], [batch_size, sequence_length + 1])
            real = start + tf.range(sequence_length, dtype=tf.int64) < lengths
            tokens = tf.where(real, window[:, :-1], 0)
            return tokens, window[:, 1:], tf.cast(real, tf.float32)

        # All rows are held once, as one tensor; a batch is a slice of it.
        data = tf.data.Dataset.range(steps).map(batch)
        return prefetched(data)


def _cut_into_rows(
    ids: np.ndarray, batch_size: int, width: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """`(n,)` -> `(B, 1 + width)` int32 and the rows' lengths, `(B, 1)` int64.

    A row is the token before it and its tokens, then zeros. Lengths differ by
    one at most, so that a small split still gives every row something.
    """
    lengths: np.ndarray = np.full(batch_size, ids.size // batch_size, np.int64)
    lengths[: ids.size % batch_size] += 1
    rows: np.ndarray = np.zeros((batch_size, 1 + width), np.int32)
    end = 0
    for row, length in zip(rows, lengths, strict=True):
        start, end = end, end + length
        row[0] = ids[start - 1] if start else EOS_ID
        row[1 : 1 + length] = ids[start:end]
    return tf.constant(rows), tf.constant(lengths[:, np.newaxis])


def load_text_corpus(
    data_dir: str | Path | None = None,
    *,
    tokenizer: str | None = None,
    vocabulary_size: int | None = None,
    min_count: int = 1,
    vocabulary: Vocabulary | None = None,
) -> TextCorpus:
    """Reads a corpus of three files, or the one that comes with the package.

    Args:
        data_dir: Str, path or None. Folder with `train`, `valid` and `test`,
            each as `.txt`, `.txt.gz` or `.txt.xz`, UTF-8. None takes the
            embedded corpus, three novels by Jane Austen. Defaults to `None`.
        tokenizer: Str or None. `"words"` for raw text; blank lines are skipped.
            `"whitespace"` for text that is tokenized already; every line
            counts, a blank one is a lone `<eos>`, as is usual for WikiText and
            the Penn Treebank. None means `"words"` for the embedded corpus and
            `"whitespace"` for a folder. Defaults to `None`.
        vocabulary_size: Int or None. Most ids, the reserved three included;
            other words become `<unk>`. Defaults to `None`: no limit.
        min_count: Int. Words that occur less often in the training text become
            `<unk>`. Defaults to `1`.
        vocabulary: A `Vocabulary` to use, for instance that of an earlier run;
            `vocabulary_size` and `min_count` then have no effect. None learns
            one from the training text alone. Defaults to `None`.

    Returns:
        A `TextCorpus`.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file has no tokens, is not UTF-8 or is damaged; the
            training text is a single line; there are two forms of one file; an
            argument is out of range.

    Example:

    >>> corpus = keras_moe.data.load_text_corpus(min_count=2)
    >>> len(corpus.vocabulary), corpus.train.size
    (6508, 354008)
    """
    if tokenizer is None:
        tokenizer = default_tokenizer(data_dir)
    tokenize("", tokenizer)  # raises if unknown
    checks.verify_int(min_count, "min_count", 1)
    if vocabulary_size is not None:
        checks.verify_int(vocabulary_size, "vocabulary_size", len(RESERVED) + 1)
    # Every token gets a provisional code when it is first met, so that no more
    # than one string a type is held.
    codes_of: defaultdict[str, int] = defaultdict(count().__next__)
    codes = {
        split: _read_codes(path, tokenizer, codes_of)
        for split, path in _find_files(data_dir).items()
    }
    num_lines = int(np.sum(codes["train"] == codes_of[EOS]))
    if num_lines < 2:
        raise ValueError(
            "The training text must have at least 2 lines: a line is a sentence or a "
            "paragraph, and its end is a token to be learnt. Received: data_dir="
            f"{str(data_dir)!r}, {num_lines} line of {codes['train'].size - 1} tokens. "
            "Put one sentence or paragraph on a line."
        )
    if vocabulary is None:
        counts = np.bincount(codes["train"], minlength=len(codes_of))
        vocabulary = Vocabulary.from_tokens(
            Counter(dict(zip(codes_of, counts.tolist(), strict=True))),
            max_size=vocabulary_size,
            min_count=min_count,
        )
    ids = vocabulary.encode(codes_of)
    name = "austen" if data_dir is None else Path(data_dir).resolve().name
    return TextCorpus(
        name, tokenizer, vocabulary, **{split: ids[codes[split]] for split in SPLITS}
    )


def default_tokenizer(data_dir: str | Path | None) -> str:
    """The tokenizer of `load_text_corpus` where none is named.

    Args:
        data_dir: That of `load_text_corpus`.

    Returns:
        `"words"` for the embedded corpus, `"whitespace"` for a folder.
    """
    return "words" if data_dir is None else "whitespace"


def _find_files(data_dir: str | Path | None) -> dict[str, Any]:
    """Path of each split."""
    if data_dir is None:
        folder = resources.files("keras_moe.data") / "corpora"
        return {split: folder / f"austen.{split}.txt.xz" for split in SPLITS}
    path = Path(data_dir)
    if not path.is_dir():
        raise FileNotFoundError(
            "`data_dir` must be a folder with train, valid and test files. "
            f"Received: data_dir={str(data_dir)!r}, which "
            f"{'is a file' if path.exists() else 'does not exist'}. Pass the "
            "folder's path, or None for the embedded corpus."
        )
    return {split: _find_file(path, split) for split in SPLITS}


def _find_file(folder: Path, split: str) -> Path:
    forms = [folder / f"{split}{suffix}" for suffix in suffixes(".txt")]
    present = [path for path in forms if path.is_file()]
    if not present:
        raise FileNotFoundError(
            f"`data_dir` has no {split!r} file. Received: data_dir={str(folder)!r}; "
            f"looked for {', '.join(path.name for path in forms)}. Put one of them "
            "there."
        )
    if len(present) > 1:
        raise ValueError(
            f"`data_dir` has {len(present)} forms of the {split!r} file. Received: "
            f"data_dir={str(folder)!r} with "
            f"{', '.join(path.name for path in present)}. Keep one of them."
        )
    return present[0]


def _read_codes(
    path: Any, tokenizer: str, codes_of: defaultdict[str, int]
) -> np.ndarray:
    """Codes of all tokens of a file, `(n,)` int32; `codes_of` learns new tokens."""
    codes = array("i")
    number = 0  # lines read so far
    words = 0
    for line in read_lines(path):
        number += 1
        tokens = tokenize(line, tokenizer)
        words += len(tokens)
        if tokens or tokenizer == "whitespace":
            codes.extend(map(codes_of.__getitem__, tokens))
            codes.append(codes_of[EOS])
    if not words:
        raise ValueError(
            f"A corpus must have at least one token in every file. Received: {path}, "
            f"{number} lines, 0 tokens. Put text into it."
        )
    return np.array(codes, np.int32)
