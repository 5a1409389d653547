"""Sentence pairs of tensorflow-datasets: wmt14_translate, ted_multi_translate."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_moe import checks
from keras_moe.data.translation import Pairs, TranslationCorpus, split_direction

_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def load_tfds_translation(
    name: str,
    *,
    directions: Sequence[str] | None = None,
    data_dir: str | Path | None = None,
    max_pairs: int | None = None,
    download: bool = False,
) -> TranslationCorpus:
    """Reads a translation dataset of tensorflow-datasets.

    For datasets of one pair of languages, such as `"wmt14_translate/fr-en"` (the
    paper's), and for those of many, such as `"ted_multi_translate"`, whose rows have
    the languages that a talk was translated into.

    Args:
        name: Str. Name of the dataset, with its config.
        directions: Directions to read, such as `["en-fr"]`. A hyphen in the name of
            a language becomes an underscore: `"en-pt_br"`. None means both of a
            dataset of two languages. Defaults to `None`.
        data_dir: Str, path or None. Where tensorflow-datasets keeps its data; None
            is its default. Defaults to `None`.
        max_pairs: Int or None. Reads so many rows of each split, at most. None
            reads all. Defaults to `None`.
        download: Bool. Whether to download and prepare the dataset first.
            Defaults to `False`.

    Returns:
        A `TranslationCorpus`.

    Raises:
        FileNotFoundError: The dataset is not prepared in `data_dir`.
        ImportError: tensorflow-datasets is not installed.
        ValueError: A direction is not in the dataset, or must be named.

    Reference:
        Shazeer et al. 2017, appendix E (WMT'14).
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "Reading tensorflow-datasets needs that package. Install "
            "keras-moe[translation]."
        ) from error
    if max_pairs is not None:
        checks.verify_int(max_pairs, "max_pairs", 1)
    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    if download:
        builder.download_and_prepare()
    languages = _languages(builder.info.features)
    if directions is None:
        if len(languages) != 2:
            raise ValueError(
                f"`directions` must be named for a dataset of {len(languages)} "
                f"languages. Received: directions=None, name={name!r}. Pass for "
                "example ['en-fr', 'fr-en']."
            )
        first, second = languages
        directions = [f"{first}-{second}", f"{second}-{first}"]
    wanted = {direction: split_direction(direction) for direction in directions}
    unknown = sorted({n for pair in wanted.values() for n in pair} - set(languages))
    if unknown or not wanted:
        raise ValueError(
            f"`directions` must be between languages of {name!r}: "
            f"{', '.join(languages)}. Received: directions={list(directions)}. Name "
            "others."
        )
    pairs: dict[str, dict[str, Pairs]] = {}
    for split, tfds_split in _SPLITS.items():
        part = tfds_split if max_pairs is None else f"{tfds_split}[:{max_pairs}]"
        try:
            rows = tfds.as_numpy(builder.as_dataset(split=part, shuffle_files=False))
        except (AssertionError, ValueError) as error:
            raise FileNotFoundError(
                f"`data_dir` must hold the prepared dataset. Received: name={name!r}, "
                f"data_dir={str(data_dir)!r}, split {part!r}: {error} Pass "
                "download=True once."
            ) from error
        pairs[split] = _collect(rows, wanted)
    empty = [d for d, (sources, _) in pairs["train"].items() if not sources]
    if empty:
        raise ValueError(
            f"`directions` must have training pairs. Received: {empty} without any in "
            f"the rows read of {name!r}. Raise `max_pairs`."
        )
    return TranslationCorpus(name, pairs)


def _languages(features: Any) -> list[str]:
    """Languages of a dataset of parallel sentences, as they stand in directions."""
    if "translations" in features:
        features = features["translations"]
    return [_named(language) for language in features.languages]


def _named(language: str) -> str:
    return language.replace("-", "_")


def _collect(rows: Any, wanted: dict[str, tuple[str, str]]) -> dict[str, Pairs]:
    found: dict[str, Pairs] = {direction: ([], []) for direction in wanted}
    for row in _texts(rows):
        for direction, (source, target) in wanted.items():
            if row.get(source) and row.get(target):
                found[direction][0].append(row[source])
                found[direction][1].append(row[target])
    return found


def _texts(rows: Any) -> Iterator[dict[str, str]]:
    """Each row as a dict of language to text, on one line."""
    for row in rows:
        if "translations" in row:
            many = row["translations"]
            row = dict(zip(many["language"], many["translation"], strict=True))
            row = {key.decode(): value for key, value in row.items()}
        yield {_named(k): " ".join(v.decode().split()) for k, v in row.items()}
