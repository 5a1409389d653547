"""Attention and a block of a transformer, position by position in float64."""

import math

import numpy as np


def rotary(x, positions, max_wavelength):
    """`(batch, time, heads, features)`: pairs of features as complex numbers."""
    half = x.shape[-1] // 2
    found = np.zeros_like(x)
    for b, t, n, i in np.ndindex(*x.shape[:-1], half):
        angle = positions[b][t] * max_wavelength ** (-2 * i / (2 * half))
        pair = complex(x[b, t, n, i], x[b, t, n, i + half]) * np.exp(1j * angle)
        found[b, t, n, i], found[b, t, n, i + half] = pair.real, pair.imag
    return found


def attention(query, keys, values, mask):
    """`(batch, target, heads, value features)`, the heads in groups."""
    batch, target, heads, features = query.shape
    found = np.zeros((batch, target, heads, values.shape[-1]))
    for b, t, n in np.ndindex(batch, target, heads):
        group = n * keys.shape[2] // heads
        seen = [s for s in range(keys.shape[1]) if mask[b][t][s]]
        scores = [
            sum(query[b, t, n] * keys[b, s, group]) / math.sqrt(features) for s in seen
        ]
        total = sum(math.exp(score) for score in scores)
        for s, score in zip(seen, scores, strict=True):
            found[b, t, n] += math.exp(score) / total * values[b, s, group]
    return found


def multi_head(x, source, mask, weights, max_wavelength=None):
    """Projections, attention and output; weights are kernels and biases in turn."""
    projected = []
    for index, inputs in enumerate((x, source, source)):
        kernel, bias = weights[2 * index : 2 * index + 2]
        heads = np.einsum("btd,dnh->btnh", inputs, kernel) + bias
        if max_wavelength is not None and index < 2:
            positions = np.tile(np.arange(inputs.shape[1]), (len(inputs), 1))
            heads = rotary(heads, positions, max_wavelength)
        projected.append(heads)
    kernel, bias = weights[6:]
    return np.einsum("btnh,nhd->btd", attention(*projected, mask), kernel) + bias


def layer_norm(x, scale, shift, epsilon=1e-5):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + shift


def dense_network(x, kernel, bias, output_kernel, output_bias):
    hidden = x @ kernel + bias
    gelu = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return gelu @ output_kernel + output_bias


def block(x, branches, first):
    """Branches `(function, scale, shift)`, with the norm before or after each."""
    for function, scale, shift in branches:
        if first:
            x = x + function(layer_norm(x, scale, shift))
        else:
            x = layer_norm(x + function(x), scale, shift)
    return x
