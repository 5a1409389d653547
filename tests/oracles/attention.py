"""The attention of appendix G, pair by pair."""

import numpy as np


def scores(query, memory, key_kernel, query_kernel, scale):
    """`(batch, target, source)`: equation 22 as it is written."""
    batch, target, _ = query.shape
    found = np.zeros((batch, target, memory.shape[1]))
    for b in range(batch):
        for j in range(target):
            for i in range(memory.shape[1]):
                for d in range(len(scale)):
                    x = sum(memory[b, i] * key_kernel[:, d])
                    y = sum(query[b, j] * query_kernel[:, d])
                    found[b, j, i] += scale[d] * np.tanh(x) * np.tanh(y)
    return found


def attention(query, memory, key_kernel, query_kernel, scale, mask):
    """`(batch, target, features)`: the mean of the memory by softmax of the scores."""
    found = scores(query, memory, key_kernel, query_kernel, scale)
    outputs = np.zeros((*query.shape[:2], memory.shape[2]))
    for b in range(len(query)):
        real = [i for i in range(memory.shape[1]) if mask[b][i]]
        for j in range(query.shape[1]):
            total = sum(np.exp(found[b, j, i]) for i in real)
            for i in real:
                outputs[b, j] += np.exp(found[b, j, i]) / total * memory[b, i]
    return outputs
