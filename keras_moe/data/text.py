"""Text corpora as streams of tokens, in batches that go on where the last ended."""

import gzip
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.vocabulary import EOS, TOKENIZERS, Vocabulary, tokenize

SPLITS = ("train", "valid", "test")
_OPENERS: dict[str, Callable] = {
    ".txt": open,
    ".txt.gz": gzip.open,
    ".txt.xz": lzma.open,
}


@dataclass(frozen=True)
class TextCorpus:
    """Three streams of token ids over one vocabulary.

    Attributes:
        name: Name of the corpus.
        tokenizer: How the text was split.
        vocabulary: The `Vocabulary`, learnt from the training text.
        train: `(n,)` int32, the training text; every line ends with `<eos>`.
        valid: Likewise, the validation text.
        test: Likewise, the test text.
    """

    name: str
    tokenizer: str
    vocabulary: Vocabulary
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def stream(self, split: str) -> np.ndarray:
        """The ids of a split.

        Raises:
            ValueError: `split` is not `"train"`, `"valid"` or `"test"`.
        """
        if split not in SPLITS:
            raise ValueError(
                f"`split` must be one of {SPLITS}. Received: split={split!r}."
            )
        return getattr(self, split)

    def num_steps(self, split: str, batch_size: int, sequence_length: int) -> int:
        """Batches of `dataset(split, batch_size, sequence_length)`."""
        batch_size = checks.verify_positive_int(batch_size, "batch_size")
        sequence_length = checks.verify_positive_int(sequence_length, "sequence_length")
        size = self.stream(split).size
        if size < batch_size:
            raise ValueError(
                f"Every row of a batch needs at least one token of the {split!r} split "
                f"of {self.name}. Received: batch_size={batch_size}, {size} tokens. "
                "Lower `batch_size`."
            )
        per_row = -(-size // batch_size)
        return -(-per_row // sequence_length)

    def dataset(
        self, split: str, batch_size: int, sequence_length: int
    ) -> tf.data.Dataset:
        """Batches for a model that carries its state from one to the next.

        The stream is cut into `batch_size` rows of equal length, the last ones
        shorter by what is missing. Row b of a batch goes on where row b of the
        batch before ended. Every token of the split is a target exactly once:
        none is lost and none counted twice. What fills up the end is padding,
        id 0 with weight 0.

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            batch_size: Int, B. Rows of a batch.
            sequence_length: Int, T. Time steps of a batch.

        Returns:
            A `tf.data.Dataset` of `(inputs, targets, weights)`: int32, int32
            and float32, each of the static shape `(B, T)`. An input is the
            token before its target, `<eos>` before the first of the split.

        Raises:
            ValueError: A size is not positive, or a row would be empty.
        """
        steps = self.num_steps(split, batch_size, sequence_length)
        ids = self.stream(split)
        rows = _cut_into_rows(ids, batch_size)
        before = np.concatenate([[self.vocabulary.encode([EOS])[0]], ids[:-1]])
        inputs = _cut_into_rows(before.astype(np.int32), batch_size)
        weights = _cut_into_rows(np.ones(ids.size, np.float32), batch_size)

        def batches(array):
            padding = steps * sequence_length - array.shape[1]
            array = np.pad(array, [(0, 0), (0, padding)])
            array = array.reshape(batch_size, steps, sequence_length)
            return np.ascontiguousarray(array.transpose(1, 0, 2))

        arrays = tuple(batches(a) for a in (inputs, rows, weights))
        with tf.device("CPU"):
            data = tf.data.Dataset.from_tensor_slices(arrays)
        return data.prefetch(tf.data.AUTOTUNE)


def _cut_into_rows(values: np.ndarray, batch_size: int) -> np.ndarray:
    """`(n,)` -> `(B, ceil(n / B))`, filled up with zeros.

    Rows differ by one value at most, so that a small split still gives every
    row something.
    """
    lengths = np.full(batch_size, values.size // batch_size)
    lengths[: values.size % batch_size] += 1
    rows = np.zeros((batch_size, lengths[0]), values.dtype)
    filled = np.arange(lengths[0]) < lengths[:, np.newaxis]
    rows[filled] = values  # row by row: a boolean mask is filled in C order
    return rows


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
        data_dir: Folder with `train`, `valid` and `test`, each as `.txt`,
            `.txt.gz` or `.txt.xz`, UTF-8. None takes the embedded corpus, three
            novels by Jane Austen. Defaults to `None`.
        tokenizer: `"words"` for raw text; blank lines are skipped.
            `"whitespace"` for tokenized text; every line counts, a blank one is
            a lone `<eos>`, as is usual for WikiText and the Penn Treebank. None
            means `"words"` for the embedded corpus and `"whitespace"` for a
            folder. Defaults to `None`.
        vocabulary_size: Int or None. Most ids, the reserved three included;
            other words become `<unk>`. Defaults to `None`: no limit.
        min_count: Int. Words that occur less often in the training text become
            `<unk>`. Defaults to `1`.
        vocabulary: A `Vocabulary` to use instead of learning one. Defaults to
            `None`.

    Returns:
        A `TextCorpus`.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file has no tokens, is not UTF-8 or is damaged; there are
            two forms of one file; an argument is out of range.
    """
    if tokenizer is None:
        tokenizer = "words" if data_dir is None else "whitespace"
    if tokenizer not in TOKENIZERS:
        tokenize("", tokenizer)  # raises
    lines = {}
    for split, path in _find_files(data_dir).items():
        lines[split] = _read_lines(path, tokenizer)
        if not any(lines[split]):
            raise ValueError(
                f"The corpus is empty: {path} has no tokens. Received: "
                f"data_dir={data_dir!r}, {len(lines[split])} lines. Put text into it."
            )
    if len(lines["train"]) < 2:
        raise ValueError(
            "The training text must have at least 2 lines, or the end of a sentence "
            f"cannot be learnt. Received: {len(lines['train'])} line of "
            f"{len(lines['train'][0])} tokens in data_dir={data_dir!r}. Put one "
            "sentence or paragraph on a line."
        )
    if vocabulary is None:
        vocabulary = Vocabulary.learn(
            lines["train"], max_size=vocabulary_size, min_count=min_count
        )
    streams = {
        split: vocabulary.encode(
            token for tokens in lines[split] for token in (*tokens, EOS)
        )
        for split in SPLITS
    }
    name = "austen" if data_dir is None else Path(data_dir).resolve().name
    return TextCorpus(name, tokenizer, vocabulary, **streams)


def _find_files(data_dir) -> dict:
    """Path of each split."""
    if data_dir is None:
        folder = resources.files("keras_moe.data") / "corpora"
        return {split: folder / f"austen.{split}.txt.xz" for split in SPLITS}
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            "`data_dir` must be a folder with train, valid and test files. "
            f"Received: data_dir={str(data_dir)!r}, which "
            f"{'is a file' if folder.exists() else 'does not exist'}."
        )
    found = {}
    for split in SPLITS:
        forms = [folder / f"{split}{suffix}" for suffix in _OPENERS]
        present = [path for path in forms if path.is_file()]
        if not present:
            raise FileNotFoundError(
                f"`data_dir` has no {split!r} file. Received: data_dir="
                f"{str(data_dir)!r}; looked for {', '.join(p.name for p in forms)}."
            )
        if len(present) > 1:
            raise ValueError(
                f"`data_dir` has more than one {split!r} file. Received: "
                f"{', '.join(p.name for p in present)} in {str(data_dir)!r}. "
                "Keep one of them."
            )
        found[split] = present[0]
    return found


def _read_lines(path, tokenizer) -> list[list[str]]:
    suffix = next(s for s in (".txt.gz", ".txt.xz", ".txt") if path.name.endswith(s))
    lines = []
    number = 0  # lines read so far
    try:
        with resources.as_file(path) as real, _OPENERS[suffix](real, "rb") as file:
            for raw in file:
                number += 1
                tokens = tokenize(raw.decode("utf-8"), tokenizer)
                if tokens or tokenizer == "whitespace":
                    lines.append(tokens)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"A corpus must be UTF-8. Received: {path}, line {number}: {error}. "
            "Convert the file first."
        ) from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"{path} could not be read after line {number}: {error}. The file is "
            "damaged or not in the format its name says; make it again."
        ) from error
    return lines
