"""Experts of other forms than the paper's, one token at a time, in float64."""

import numpy as np


def silu(v):
    return v / (1.0 + np.exp(-v))


def gated(x, kernels, biases=(0.0, 0.0, 0.0), activation=silu):
    """One gated linear unit on one token: Shazeer 2020, equations 5 and 6."""
    a, b, c = kernels
    hidden = activation(x @ a + biases[0]) * (x @ b + biases[1])
    return hidden @ c + biases[2]


def mixture(x, dense_gates, expert):
    """Equation 1, where `expert(e, x)` is what expert e answers to one token."""
    rows = []
    for token, gates in zip(x, dense_gates, strict=True):
        answers = [g * expert(e, token) for e, g in enumerate(gates) if g != 0.0]
        rows.append(np.sum(answers, axis=0))
    return np.array(rows)
