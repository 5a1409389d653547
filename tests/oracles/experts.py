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


def low_rank(kernel, a, b, factor):
    """W + f A B, element by element: Hu et al. 2021, equation 3."""
    result = np.array(kernel, dtype="float64")
    for i, j in np.ndindex(result.shape):
        result[i, j] += factor * sum(a[i, r] * b[r, j] for r in range(a.shape[1]))
    return result


def eight_bits(kernel):
    """Whole numbers and scales of one expert's kernel, column by column."""
    numbers, scales = np.zeros(kernel.shape, "int8"), np.zeros(kernel.shape[1])
    for j in range(kernel.shape[1]):
        scales[j] = 127.0 / (np.max(np.abs(kernel[:, j])) + 1e-7)
        numbers[:, j] = np.round(kernel[:, j] * scales[j])
    return numbers, scales


def kept_units(key_digits, function_parts, rate):
    """Which units of an expert keep a token: `(4,)` and `(4, U)` -> `(U,)` bool."""
    key = 0
    for digit in key_digits:
        key = key * 256 + int(digit)
    kept = []
    for a_high, a_low, b_high, b_low in np.asarray(function_parts).T:
        a = 2 * (int(a_high) * 65536 + int(a_low)) + 1
        b = int(b_high) * 65536 + int(b_low)
        kept.append((key * a + b) % 2**32 >= round(rate * 2**32))
    return np.array(kept)


def dropped(hidden, kept, rate):
    """Inverted dropout of one token's hidden units."""
    return np.where(kept, hidden / (1.0 - rate), 0.0)
