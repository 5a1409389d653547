"""Sentence pairs in one or many directions, and batches of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.files import read_lines, suffixes
from keras_moe.data.pipelines import prefetched
from keras_moe.data.subwords import SubwordVocabulary
from keras_moe.data.vocabulary import EOS_ID, PAD_ID

SPLITS = ("train", "valid", "test")
# Lengths that a batch holds together, the last without end.
_BOUNDARIES = (8, 11, 14, 18, 24, 32, 48, 64, 96, 128, 192, 256)

Pairs = tuple[list[str], list[str]]


@dataclass(frozen=True, eq=False)
class TranslationCorpus:
    """Sentence pairs by split and direction.

    A direction is two language names with a hyphen, `"en-fr"` for English to
    French.

    Args:
        name: Str. Name of the corpus.
        pairs: Dict of split to dict of direction to `(sources, targets)`, two
            lists of str of equal length.

    Example:

    >>> corpus = keras_moe.data.load_translation_corpus(directions=["en-fr"])
    >>> sources, targets = corpus.pairs["test"]["en-fr"]
    >>> row = sources.index("Add row")
    >>> targets[row]
    'Ajouter une ligne'
    """

    name: str
    pairs: dict[str, dict[str, Pairs]]

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions of the training pairs."""
        return tuple(self.pairs["train"])

    @property
    def target_languages(self) -> tuple[str, ...]:
        """Languages to translate into, in the order of the directions."""
        return tuple(dict.fromkeys(split_direction(d)[1] for d in self.directions))

    def texts(self, split: str = "train") -> Iterator[str]:
        """All sentences of a split, each side of each pair once.

        Args:
            split: `"train"`, `"valid"` or `"test"`. Defaults to `"train"`.

        Yields:
            Str.
        """
        checks.verify_choice(split, "split", SPLITS)
        seen = set()
        for direction, sides in self.pairs[split].items():
            for language, side in zip(split_direction(direction), sides, strict=True):
                # The same list serves both directions of a pair of languages.
                if (language, id(side)) not in seen:
                    seen.add((language, id(side)))
                    yield from side

    def sampling_weights(self, temperature: float = 1.0) -> np.ndarray:
        """Share of each direction in training, $p_i \\propto n_i^{1/T}$.

        Args:
            temperature: Float T, at least 1. 1 samples in proportion to the number
                of pairs; a high one approaches equal shares. Defaults to `1.0`.

        Returns:
            `(directions,)` float64, summing to 1.

        Raises:
            ValueError: `temperature` is below 1.

        Reference:
            Arivazhagan et al. 2019, "Massively multilingual neural machine
            translation in the wild", section 4.
        """
        temperature = checks.verify_number(
            temperature,
            "temperature",
            "[1, inf)",
            ". Pass 1 to sample as the data are.",
        )
        sizes = np.array([len(s) for s, _ in self.pairs["train"].values()], np.float64)
        weights = (sizes / sizes.sum()) ** (1.0 / temperature)
        return weights / weights.sum()

    def dataset(
        self,
        split: str,
        vocabulary: SubwordVocabulary,
        *,
        batch_tokens: int = 4096,
        max_length: int = 64,
        temperature: float = 1.0,
        shuffle: bool | None = None,
        seed: int = 1,
    ) -> tf.data.Dataset:
        """Batches of pairs of about equal length.

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            vocabulary: `SubwordVocabulary`.
            batch_tokens: Int. Most positions of a batch on the longer side, with
                padding. Defaults to `4096`.
            max_length: Int. Pairs with more pieces on a side are left out.
                Defaults to `64`.
            temperature: Float. See `sampling_weights`; with 1 a pass has every
                pair once, with more the pairs of an epoch are drawn, as many
                as there are. Defaults to `1.0`.
            shuffle: Bool or None. Whether pairs come in random order; None means
                in training only. Defaults to `None`.
            seed: Int. Of the order. Defaults to `1`.

        Returns:
            A `tf.data.Dataset` of `((source, target_inputs), targets)`, int32,
            each `(batch, length)`, padded with 0 at the end. `target_inputs` are
            the targets moved by one, `<eos>` first.

        Raises:
            ValueError: `split` is unknown or has no pairs, a size is below 1.
        """
        checks.verify_choice(split, "split", SPLITS)
        seed = checks.verify_seed(seed)
        checks.verify_int(max_length, "max_length", 1)
        checks.verify_int(batch_tokens, "batch_tokens", max_length)
        shuffle = split == "train" if shuffle is None else shuffle
        data = self._encoded(split, vocabulary, temperature, shuffle, seed)
        data = data.filter(
            lambda s, t: tf.maximum(tf.size(s), tf.size(t)) <= max_length
        )
        boundaries = [b for b in _BOUNDARIES if b < max_length]
        sizes = [max(1, batch_tokens // b) for b in (*boundaries, max_length)]
        data = data.bucket_by_sequence_length(
            lambda s, t: tf.maximum(tf.size(s), tf.size(t)),
            # An upper boundary of Keras' is not in its bucket.
            [b + 1 for b in boundaries],
            sizes,
        )

        return prefetched(
            data.map(
                lambda source, targets: ((source, target_inputs(targets)), targets)
            )
        )

    def _encoded(self, split, vocabulary, temperature, shuffle, seed):
        """Pairs of ids, one by one; encoded in the first pass, then held."""
        weights = self.sampling_weights(temperature) if temperature != 1.0 else None
        parts = []
        for number, (direction, pairs) in enumerate(self.pairs[split].items()):
            part = _encode(vocabulary, direction, pairs).cache()
            if shuffle and weights is not None:
                part = part.shuffle(len(pairs[0]), seed=seed + number).repeat()
            parts.append(part)
        if not parts:
            raise ValueError(
                f"`split` must have pairs. Received: split={split!r}, of which "
                f"{self.name!r} has none. Add its file to the folder."
            )
        total = sum(len(sources) for sources, _ in self.pairs[split].values())
        if shuffle and weights is not None:
            return tf.data.Dataset.sample_from_datasets(
                parts, weights.tolist(), seed=seed
            ).take(total)
        data = parts[0]
        for part in parts[1:]:
            data = data.concatenate(part)
        return data.shuffle(total, seed=seed) if shuffle else data


def _encode(vocabulary, direction, pairs):
    """A dataset of `(source, target)`, each `(length,)` int32."""
    language = split_direction(direction)[1]
    data = tf.data.Dataset.from_tensor_slices(
        (np.array(pairs[0], object), np.array(pairs[1], object))
    )

    def encode(sources, targets):
        languages = tf.fill(tf.shape(sources), language)
        return (
            vocabulary.encode_source(sources, languages),
            vocabulary.encode_target(targets),
        )

    data = data.batch(1024).map(encode, num_parallel_calls=1)
    return data.unbatch().map(lambda s, t: (s, t))


def target_inputs(targets: tf.Tensor) -> tf.Tensor:
    """What the decoder is given: the targets moved by one, `<eos>` first.

    Args:
        targets: `(batch, length)` int, padded with 0 at the end.

    Returns:
        The same shape. Where a shorter sentence has ended nothing goes in: 0.
    """
    moved = tf.pad(targets[:, :-1], [[0, 0], [1, 0]], constant_values=EOS_ID)
    return tf.where(tf.equal(targets, PAD_ID), PAD_ID, moved)


def split_direction(direction: str) -> tuple[str, str]:
    """`"en-fr"` -> `("en", "fr")`.

    Raises:
        ValueError: It is not two different names with a hyphen between.
    """
    parts = direction.split("-")
    if len(parts) != 2 or not all(parts) or parts[0] == parts[1]:
        raise ValueError(
            "A direction must be two different language names with a hyphen. Received: "
            f"direction={direction!r}. Write it like 'en-fr'."
        )
    return parts[0], parts[1]


def load_translation_corpus(
    data_dir: str | Path | None = None,
    *,
    directions: Sequence[str] | None = None,
) -> TranslationCorpus:
    """Reads tab-separated sentence pairs, or those that come with the package.

    Args:
        data_dir: Str, path or None. Folder with files `train.en-fr.tsv`,
            `valid.en-fr.tsv`, `test.en-fr.tsv` for every pair of languages
            (also `.gz` and `.xz`), UTF-8, one pair a line:
            `English<TAB>French`. None takes the embedded corpus, strings of user
            interfaces in en, fr, de, es, ja, ko and pt_BR. Defaults to `None`.
        directions: Directions to read, such as `["en-fr", "fr-en"]`; a file
            serves both. None means both directions of every pair with English
            of the embedded corpus, or of every file of the folder. Defaults to
            `None`.

    Returns:
        A `TranslationCorpus`.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: A file is not what it should be; a direction is malformed or
            not in the corpus.

    Example:

    >>> corpus = keras_moe.data.load_translation_corpus()
    >>> len(corpus.directions), corpus.target_languages
    (12, ('fr', 'en', 'de', 'es', 'ja', 'ko', 'pt_BR'))
    """
    wanted = None
    if directions is not None:
        wanted = [*dict.fromkeys(checks.verify_texts(directions, "directions"))]
    if wanted is not None:
        for direction in wanted:
            split_direction(direction)
        if not wanted:
            raise ValueError(
                "`directions` must name at least one direction. Received: "
                "directions=[]. Pass None for all."
            )
    if data_dir is None:
        return TranslationCorpus("ui6", _read_embedded(wanted))
    folder = Path(data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            "`data_dir` must be a folder with files like train.en-fr.tsv. Received: "
            f"data_dir={str(data_dir)!r}. Pass the folder's path, or None for the "
            "embedded corpus."
        )
    if wanted is None:
        names = sorted(p.name.split(".")[1] for p in folder.glob("train.*-*.tsv*"))
        wanted = [d for name in names for d in (name, _reverse(name))]
    if not wanted:
        raise FileNotFoundError(
            "`data_dir` has no training file. Received: "
            f"data_dir={str(data_dir)!r}; looked for train.<a>-<b>.tsv, .tsv.gz and "
            ".tsv.xz. Put one there."
        )
    return TranslationCorpus(folder.resolve().name, _read_folder(folder, wanted))


def _reverse(direction):
    source, target = split_direction(direction)
    return f"{target}-{source}"


def _read_folder(folder, directions):
    pairs: dict[str, dict[str, Pairs]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        read: dict[Path, Pairs] = {}
        for direction in directions:
            path, is_reversed = _find_file(folder, split, direction)
            if path not in read:
                rows = [line.rstrip("\r\n") for line in read_lines(path)]
                read[path] = _split_columns(rows, path)
            left, right = read[path]
            pairs[split][direction] = (right, left) if is_reversed else (left, right)
    return pairs


def _find_file(folder, split, direction):
    tried = []
    for name in (direction, _reverse(direction)):
        for suffix in suffixes(".tsv"):
            path = folder / f"{split}.{name}{suffix}"
            tried.append(path.name)
            if path.is_file():
                return path, name != direction
    raise FileNotFoundError(
        f"`data_dir` has no {split!r} file for direction={direction!r}. Received: "
        f"data_dir={str(folder)!r}; looked for {', '.join(tried)}. Put one of them "
        "there."
    )


def _split_columns(rows: Iterable[str], path) -> Pairs:
    left, right = [], []
    for number, row in enumerate(rows, 1):
        cells = row.split("\t")
        if len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
            raise ValueError(
                "A line must be two sentences with a tab between. Received: "
                f"{row[:80]!r} in line {number} of {path}. Correct the line."
            )
        left.append(cells[0].strip())
        right.append(cells[1].strip())
    if not left:
        raise ValueError(
            f"A file must have at least one pair. Received: {path}, 0 lines. Put "
            "pairs into it."
        )
    return left, right


def _read_embedded(directions):
    pairs: dict[str, dict[str, Pairs]] = {}
    for split in SPLITS:
        path = resources.files("keras_moe.data") / "corpora" / f"ui6.{split}.tsv.xz"
        header, *rows = [line.rstrip("\r\n").split("\t") for line in read_lines(path)]
        if directions is None:
            both = [(f"en-{name}", f"{name}-en") for name in header[1:]]
            directions = [direction for two in both for direction in two]
        pairs[split] = {}
        for direction in directions:
            languages = split_direction(direction)
            unknown = [name for name in languages if name not in header]
            if unknown:
                raise ValueError(
                    "`directions` must be between languages of the embedded corpus, "
                    f"{', '.join(header)}. Received: {direction!r}. Pass `data_dir` "
                    "for others."
                )
            a, b = (header.index(name) for name in languages)
            chosen = [(row[a], row[b]) for row in rows if row[a] and row[b]]
            pairs[split][direction] = ([p[0] for p in chosen], [p[1] for p in chosen])
    return pairs
