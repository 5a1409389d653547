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


def usage(importance, counts):
    """Figures of the use of experts, one expert after the other."""
    figures = {}
    for name, values in (("importance_cv", importance), ("load_cv", counts)):
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        figures[name] = math.sqrt(variance) / mean
    figures["max_over_mean_load"] = max(counts) / (sum(counts) / len(counts))
    figures["dead_experts"] = sum(1 for count in counts if count == 0)
    return figures


def gate_entropy(gates):
    """Sum over the rows of `(N, K)` of their entropies."""
    return sum(entropy(row) for row in gates)


def entropy(probabilities):
    """In nats; zeros count nothing."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)
