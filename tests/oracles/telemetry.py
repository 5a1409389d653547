"""What the telemetry counts, by loops, in float64."""

import math

import numpy as np


def label_information(unit_counts, labels, num_labels):
    """Shares `(E, labels)` and the mutual information as H(E) + H(L) - H(E, L)."""
    num_experts = len(unit_counts[0])
    counts = np.zeros((num_experts, num_labels))
    for row, label in zip(unit_counts, labels, strict=True):
        for expert, count in enumerate(row):
            counts[expert, label] += count
    for label in range(num_labels):
        if counts[:, label].sum():
            counts[:, label] /= counts[:, label].sum()
    joint = counts / counts.sum()
    return counts, (
        entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint.ravel())
    )


def entropy(probabilities):
    """In nats; zeros count nothing."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)
