"""Slots of experts and what they compute, in NumPy float64, one assignment at a time."""

import math

import numpy as np

from tests.oracles.mixture import feed_forward


def slot_sizes(num_assignments, num_experts):
    """Slots of an expert, and rows of a block of what exceeds them."""
    if not num_assignments:
        return 0, 0
    if num_assignments < num_experts / 4:
        return 0, 8
    slots = math.ceil(1.25 * num_assignments / num_experts)
    unit = 8
    for bound, larger in ((512, 16), (1024, 32), (2048, 64), (4096, 128)):
        if slots >= bound:
            unit = larger
    slots = max(math.ceil(slots / unit) * unit, 8)
    return slots, min(max(math.ceil((slots // 2) / 8) * 8, 8), 256)


def assignments_of(expert_indices, num_experts, mask=None):
    """For each expert its assignments, in the order of the tokens."""
    found = [[] for _ in range(num_experts)]
    for n, row in enumerate(expert_indices):
        for k, expert in enumerate(row):
            if expert >= 0 and (mask is None or mask[n]):
                found[expert].append(n * len(row) + k)
    return found


def answers(x, expert_indices, kernels):
    """`(N, K, out)`, zero where an assignment has no expert."""
    found = np.zeros((*expert_indices.shape, kernels[-1].shape[2]))
    for n, row in enumerate(expert_indices):
        for k, expert in enumerate(row):
            if expert >= 0:
                own = [kernel[expert] for kernel in kernels]
                found[n, k] = feed_forward(x[n], own, activation=np.tanh)
    return found


def mixture(x, gates, expert_indices, kernels):
    """`(N, out)`, the answers of each token weighted by its gates and summed."""
    found = answers(x, expert_indices, kernels)
    return np.einsum("nk,nko->no", gates, found)
