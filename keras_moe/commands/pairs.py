"""Sentence pairs of a run of `train-mt`, looked at before the training."""

import tensorflow as tf

from keras_moe import data, telemetry
from keras_moe.data.translation import split_direction

# Training pairs of a direction by which an epoch of `steps_per_epoch` is judged.
_SAMPLED_PAIRS = 1000


def verify_pairs(corpus):
    """Raises unless there is what the end of a run needs.

    Raises:
        ValueError: A direction has no test pairs.
        ImportError: What scores them is not installed.
    """
    for direction, (sources, targets) in corpus.pairs["test"].items():
        if not sources:
            raise ValueError(
                "Every direction must have test pairs. Received: 0 pairs of "
                f"{direction!r} in {corpus.name!r}. Add some, or leave the direction "
                "out of `directions`."
            )
        telemetry.translation_scores(
            targets[:1], targets[:1], split_direction(direction)[1]
        )


def _dataset(corpus, split, vocabulary, options, **changes):
    return corpus.dataset(
        split,
        vocabulary,
        batch_tokens=options.batch_tokens,
        max_length=options.max_length,
        temperature=options.temperature,
        seed=options.seed,
        **changes,
    )


def epoch_batches(corpus, split, vocabulary, options, show=True):
    """Batches of a split, and how many an epoch has.

    With `steps_per_epoch` no pass is made over the training pairs to count them.

    Args:
        corpus: `TranslationCorpus`.
        split: Str. `"train"`, `"valid"` or `"test"`.
        vocabulary: `SubwordVocabulary`.
        options: `TrainMTOptions`.
        show: Bool. Whether to print how many pairs are left out. Defaults to `True`.

    Returns:
        A `tf.data.Dataset` and an int.

    Raises:
        ValueError: All pairs are too long.
    """
    dataset = _dataset(corpus, split, vocabulary, options)
    if split != "train" or options.steps_per_epoch is None:
        # A pass to count them; from now on the subwords are held in memory.
        steps, kept = _count(dataset)
        total = sum(len(sources) for sources, _ in corpus.pairs[split].values())
        seen = f"{total:,}"
    else:
        steps, kept, total = options.steps_per_epoch, 0, 0
        for first in (_SAMPLED_PAIRS, None):
            if kept == 0:
                some = _first_pairs(corpus, first)
                _, kept = _count(
                    _dataset(some, split, vocabulary, options, shuffle=False)
                )
                total = sum(len(sources) for sources, _ in some.pairs[split].values())
        seen = f"the first {total:,}"
    if kept == 0:
        raise ValueError(
            f"`max_length` must let {split} pairs through. Received: max_length="
            f"{options.max_length}; all {total:,} have more subwords on a side and are "
            "left out. Raise it, or split the sentences."
        )
    if kept < total and show:
        print(
            f"{total - kept:,} of {seen} {split} pairs are left out: more than "
            f"--max-length {options.max_length} subwords on a side.",
            flush=True,
        )
    return dataset, steps


def _first_pairs(corpus, count):
    pairs = {
        direction: (sources[:count], targets[:count])
        for direction, (sources, targets) in corpus.pairs["train"].items()
    }
    return data.TranslationCorpus(corpus.name, {"train": pairs})


def _count(dataset):
    """Batches and pairs."""
    sizes = [len(targets) for _, targets in dataset]
    return len(sizes), sum(sizes)


def of_known_length(dataset, steps):
    """A dataset that Keras knows the length of."""
    return dataset.apply(tf.data.experimental.assert_cardinality(steps))
