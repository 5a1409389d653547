"""The sampled cross-entropy in NumPy float64, one token after the other."""

import numpy as np


def sampled_cross_entropy(inputs, kernel, bias, targets, candidates, expected_counts):
    """`(N,)` losses."""
    losses = []
    for x, target in zip(inputs, targets, strict=True):
        scores = kernel @ x + bias
        normalizer = np.exp(scores[target])
        for candidate, expected in zip(candidates, expected_counts, strict=True):
            if candidate != target:
                normalizer += np.exp(scores[candidate]) / expected
        losses.append(np.log(normalizer) - scores[target])
    return np.array(losses)


def cross_entropy(inputs, kernel, bias, targets):
    """`(N,)` losses of the full softmax."""
    scores = inputs @ kernel.T + bias
    normalizers = np.log(np.sum(np.exp(scores), axis=1))
    return normalizers - scores[np.arange(len(targets)), targets]


def cross_entropy_of_logits(logits, targets):
    """`(N,)` losses."""
    losses = []
    for scores, target in zip(logits, targets, strict=True):
        highest = max(scores)
        total = sum(np.exp(score - highest) for score in scores)
        losses.append(np.log(total) + highest - scores[target])
    return np.array(losses)
