"""Gates of later papers in NumPy float64, written as loops."""

import fractions
import math

import numpy as np

from tests.oracles import mixture


def scores(logits, kind):
    if kind == "softmax":
        return np.array([mixture.softmax(row) for row in logits]).reshape(logits.shape)
    return 1.0 / (1.0 + np.exp(-logits))


def biased_choice(logits, bias, k, kind="sigmoid", num_groups=1, num_kept_groups=1):
    """The experts of each token; DeepSeek-V3, equations 14 to 16."""
    size = logits.shape[1] // num_groups
    chosen = []
    for row in scores(logits, kind) + bias:
        groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
        best = 2 if kind == "sigmoid" else 1
        values = [sum(sorted(row[group])[-best:]) for group in groups]
        allowed = sorted(
            i for g in mixture.top_k(values, num_kept_groups) for i in groups[g]
        )
        order = mixture.top_k(row[allowed], k)
        chosen.append([allowed[i] for i in order])
    return chosen


def biased_gates(logits, bias, k, kind="sigmoid", normalization="selected", **groups):
    """A dense matrix of gates; DeepSeek-V3, equations 13 and 14."""
    gates = np.zeros_like(logits)
    all_scores = scores(logits, kind)
    chosen = biased_choice(logits, bias, k, kind, **groups)
    for n, experts in enumerate(chosen):
        total = all_scores[n, experts].sum() if normalization == "selected" else 1.0
        gates[n, experts] = all_scores[n, experts] / total
    return gates


def balanced_bias(bias, counts, rate):
    """Wang et al. 2024, algorithm 1."""
    mean = sum(counts) / len(counts)
    return np.array(
        [b + rate * np.sign(mean - c) for b, c in zip(bias, counts, strict=True)]
    )


def expert_choice(logits, capacity, mask=None):
    """A dense matrix of gates; Zhou et al. 2022, equation 1."""
    gates = scores(logits, "softmax")
    kept = np.zeros_like(gates)
    real = [n for n in range(len(logits)) if mask is None or mask[n]]
    for i in range(gates.shape[1]):
        for place in mixture.top_k(gates[real, i], min(capacity, len(real))):
            kept[real[place], i] = gates[real[place], i]
    return kept


def expert_choice_capacity(num_tokens, num_experts, capacity_factor):
    exact = fractions.Fraction(capacity_factor) * num_tokens / num_experts
    return min(math.ceil(exact), num_tokens)


def second_choice(logits, policy, uniform=None, threshold=0.2):
    """A dense matrix of gates; Lepikhin et al. 2020, algorithm 1."""
    gates = np.zeros_like(logits)
    for n, row in enumerate(scores(logits, "softmax")):
        first, second = mixture.top_k(row, 2)
        g1, g2 = row[first], row[second]
        share = g2 / (g1 + g2)
        gates[n, first] = g1 / (g1 + g2)
        used = {
            "all": True,
            "random": uniform is None or 2 * share > uniform[n],
            "threshold": share > threshold,
        }
        if used[policy]:
            gates[n, second] = share
    return gates
