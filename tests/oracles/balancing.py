"""Appendix F in NumPy float64, written as loops."""

import math

import numpy as np

from tests.oracles import mixture


def tokens_per_expert(num_tokens, num_experts, k):
    nearest = math.floor(k * num_tokens / num_experts + 0.5)
    return min(max(nearest, 1), num_tokens)


def softmax_gates(logits):
    """Equation 15."""
    return np.array([mixture.softmax(row) for row in logits]).reshape(logits.shape)


def batchwise_mask(gates, m):
    """Equation 18."""
    mask = np.zeros(gates.shape, bool)
    for i in range(gates.shape[1]):
        mask[mixture.top_k(gates[:, i], m), i] = True
    return mask


def threshold_mask(gates, thresholds):
    """Equation 19."""
    mask = np.zeros(gates.shape, bool)
    for j in range(gates.shape[0]):
        for i in range(gates.shape[1]):
            mask[j, i] = gates[j, i] > thresholds[i]
    return mask


def masked_gates(softmax_gates, mask):
    """Equation 16; a row of which nothing is selected stays zero."""
    gates = np.zeros_like(softmax_gates)
    for j in range(gates.shape[0]):
        total = sum(softmax_gates[j, mask[j]])
        for i in range(gates.shape[1]):
            if mask[j, i]:
                gates[j, i] = softmax_gates[j, i] / total
    return gates


def threshold_loss(gates, thresholds, m):
    """Equation 20."""
    total = 0.0
    by_threshold = threshold_mask(gates, thresholds)
    by_batch = batchwise_mask(gates, m)
    for j in range(gates.shape[0]):
        for i in range(gates.shape[1]):
            difference = float(by_threshold[j, i]) - float(by_batch[j, i])
            total += difference * (gates[j, i] - thresholds[i])
    return total


def balanced_mixture(x, gate_kernel, kernels, k=None, thresholds=None):
    """The whole layer: in training with `k`, at inference with `thresholds`."""
    gates = softmax_gates(x @ gate_kernel)
    if thresholds is None:
        m = tokens_per_expert(len(x), gates.shape[1], k)
        mask = batchwise_mask(gates, m)
    else:
        mask = threshold_mask(gates, thresholds)
    return mixture.mixture(x, masked_gates(gates, mask), kernels)
