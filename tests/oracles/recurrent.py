"""The recurrent mixture in NumPy float64, step by step and token by token."""

import numpy as np

from tests.oracles import mixture


def sigmoid(v):
    return 1.0 / (1.0 + np.exp(-v))


def moe_lstm(x, h, c, kernels, bias, gate_kernel, stddev, noise, mask, k):
    """Hidden states, last h and c, importance and smooth load."""
    num_experts = len(kernels)
    units = h.shape[1]
    h, c = h.copy(), c.copy()
    importance, load = np.zeros(num_experts), np.zeros(num_experts)
    hidden = []
    for t in range(len(x)):
        for b in range(len(h)):
            if not mask[t, b]:
                continue
            u = np.concatenate([x[t, b], h[b]])
            clean = u @ gate_kernel
            noisy = clean + stddev * noise[t, b]
            gates = mixture.top_k_gates(noisy[None], k)[0]
            importance += gates
            load += mixture.prob_in_top_k(
                clean[None], noisy[None], np.full((1, num_experts), stddev), k
            )[0]
            z = bias + sum(gates[e] * (u @ kernels[e]) for e in range(num_experts))
            i, f, g, o = (z[n * units : (n + 1) * units] for n in range(4))
            c[b] = sigmoid(f) * c[b] + sigmoid(i) * np.tanh(g)
            h[b] = sigmoid(o) * np.tanh(c[b])
        hidden.append(h.copy())
    return np.stack(hidden), h, c, importance, load
