"""How much the choice of expert tells about a label."""

from typing import NamedTuple

import numpy as np

from keras_moe import checks


class LabelInformation(NamedTuple):
    """Experts and labels, counted together.

    Attributes:
        counts: `(E, labels)` float64: share of each label's tokens that each expert
            took; every label has the sum 1 (or 0, if it has no tokens).
        information: Float. Mutual information of expert and label, in nats.
        shuffled: The same for labels shuffled among the units: what chance gives.
    """

    counts: np.ndarray
    information: float
    shuffled: tuple[float, ...]


def label_information(
    unit_counts: np.ndarray,
    labels: np.ndarray,
    num_labels: int,
    *,
    shuffles: int = 20,
    seed: int = 0,
) -> LabelInformation:
    """Mutual information of experts and labels, and what chance would give.

    Every label counts the same, however many tokens it has, so the information is
    at most `log(num_labels)`. Tokens that belong together (a sentence, all of one
    label) make one unit: shuffling labels among single tokens would make the null
    too small.

    Args:
        unit_counts: `(units, E)`, how many tokens of each unit each expert took.
        labels: `(units,)` int, from 0 to `num_labels - 1`.
        num_labels: Int. Number of labels.
        shuffles: Int. Size of the null sample. Defaults to `20`.
        seed: Int. Seed of the shuffles. Defaults to `0`.

    Returns:
        A `LabelInformation`.

    Raises:
        ValueError: Shapes do not fit, a label is out of range, or there are no
            counts.

    Example:

    >>> found = keras_moe.telemetry.label_information(
    ...     np.array([[4, 0], [4, 0], [0, 4], [0, 4]]), np.array([0, 0, 1, 1]), 2
    ... )
    >>> round(found.information, 3)  # log 2
    0.693
    """
    unit_counts, labels = np.asarray(unit_counts), np.asarray(labels)
    if unit_counts.ndim != 2 or labels.shape != unit_counts.shape[:1]:
        raise ValueError(
            "`unit_counts` must be (units, experts) and `labels` (units,). Received: "
            f"shapes {unit_counts.shape} and {labels.shape}. Give each unit a label."
        )
    num_labels = checks.verify_int(num_labels, "num_labels")
    labels = np.asarray(checks.verify_ids(labels, "labels"))
    if labels.size and not 0 <= labels.min() <= labels.max() < num_labels:
        raise ValueError(
            f"`labels` must be from 0 to num_labels - 1. Received: {labels.min()} to "
            f"{labels.max()}, num_labels={num_labels}. Number them from 0."
        )
    _verify_counts(unit_counts, "unit_counts")
    checks.verify_int(shuffles, "shuffles", 0)
    units, experts = np.nonzero(unit_counts)
    return assignment_information(
        experts,
        labels[units],
        (unit_counts.shape[1], num_labels),
        weights=unit_counts[units, experts],
        units=units,
        shuffles=shuffles,
        seed=seed,
    )


def assignment_information(
    experts: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, int],
    *,
    units: np.ndarray,
    weights: np.ndarray | None = None,
    shuffles: int = 20,
    seed: int = 0,
) -> LabelInformation:
    """`label_information` of single assignments, without a `(units, E)` matrix.

    Args:
        experts: `(M,)` int, the expert of each assignment.
        labels: `(M,)` int, the label of the unit of each assignment.
        shape: E and the number of labels.
        units: `(M,)` int, the unit of each assignment, from 0.
        weights: `(M,)`, how often each counts; None means once.
        shuffles: Int. Size of the null sample. Defaults to `20`.
        seed: Int. Seed of the shuffles. Defaults to `0`.

    Returns:
        A `LabelInformation`.
    """
    generator = np.random.default_rng(seed)
    present, of_unit = np.unique(units, return_inverse=True)
    label_of_unit = np.zeros(present.size, np.int64)
    label_of_unit[of_unit] = labels

    def shares(label_of_unit):
        """`(E, labels)`, each label with the same sum."""
        cells = experts * shape[1] + label_of_unit[of_unit]
        counts = np.bincount(cells, weights, shape[0] * shape[1]).reshape(shape)
        return counts / np.maximum(counts.sum(0, keepdims=True), 1e-300)

    counts = shares(label_of_unit)
    shuffled = [
        mutual_information(shares(generator.permutation(label_of_unit)))
        for _ in range(shuffles)
    ]
    return LabelInformation(counts, mutual_information(counts), tuple(shuffled))


def _verify_counts(counts, name):
    if counts.ndim != 2 or not 0 < counts.sum() < np.inf or counts.min() < 0:
        raise ValueError(
            f"`{name}` must be a matrix of counts that are not all 0. Received: shape "
            f"{counts.shape}, sum {counts.sum()}. Count at least one token."
        )


def mutual_information(counts: np.ndarray) -> float:
    """Mutual information of two things that were counted together, in nats.

    $I = \\sum_{e,l} p(e,l) \\log \\frac{p(e,l)}{p(e) p(l)}$

    Args:
        counts: `(experts, labels)`, how often each pair occurred.

    Returns:
        Float, from 0 (independent) to the smaller of the two entropies.

    Raises:
        ValueError: `counts` is not a matrix, or is empty or negative.

    Example:

    >>> keras_moe.telemetry.mutual_information(np.ones((3, 2)))
    0.0
    """
    counts = np.asarray(counts, np.float64)
    _verify_counts(counts, "counts")
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))
