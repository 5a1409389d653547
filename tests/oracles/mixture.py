"""The paper's equations in NumPy float64, written as loops.

Nothing here imports the package or TensorFlow, and nothing is fast: these
functions are what the package is measured against.
"""

import math

import numpy as np


def softmax(v):
    e = np.exp(v - np.max(v))
    return e / e.sum()


def softplus(v):
    return np.logaddexp(0.0, v)


def normal_cdf(z):
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))


def top_k(v, k):
    """Indices of the k largest values, the largest first, ties to the left."""
    return sorted(range(len(v)), key=lambda i: (-v[i], i))[:k]


def top_k_gates(logits, k, normalization="selected"):
    """Equations 3 and 5, as a dense matrix of gates."""
    gates = np.zeros_like(logits)
    for n, row in enumerate(logits):
        kept = top_k(row, k)
        if normalization == "selected":
            gates[n, kept] = softmax(row[kept])
        else:
            gates[n, kept] = softmax(row)[kept]
    return gates


def kth_excluding(v, k, i):
    """The k-th largest component of v, leaving out component i."""
    return sorted(np.delete(v, i), reverse=True)[k - 1]


def prob_in_top_k(clean, noisy, stddev, k):
    """Equation 9."""
    probs = np.zeros_like(clean)
    for n in range(clean.shape[0]):
        for i in range(clean.shape[1]):
            threshold = kth_excluding(noisy[n], k, i)
            probs[n, i] = normal_cdf((clean[n, i] - threshold) / stddev[n, i])
    return probs


def cv_squared(values):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return variance / mean**2


def router_z_loss(logits):
    """Zoph et al. 2022, equation 5."""
    return sum(math.log(sum(np.exp(row))) ** 2 for row in logits) / len(logits)


def switch_loss(probabilities, counts):
    """Fedus et al. 2021, equations 4 to 6."""
    num_experts = len(counts)
    return num_experts * sum(
        counts[i] / sum(counts) * sum(probabilities[:, i]) / len(probabilities)
        for i in range(num_experts)
    )


def choices_kept(clean, experts):
    """For each token the share of its k best that are among the chosen."""
    k = len(experts[0])
    return [
        len(set(top_k(row, k)) & set(chosen)) / k
        for row, chosen in zip(clean, experts, strict=True)
    ]


def relu(v):
    return np.maximum(v, 0.0)


def feed_forward(x, kernels, biases=None, activation=relu):
    """One expert on one token."""
    for i, kernel in enumerate(kernels):
        x = x @ kernel
        if biases is not None:
            x = x + biases[i]
        if i < len(kernels) - 1:
            x = activation(x)
    return x


def mixture(x, dense_gates, kernels, biases=None, activation=relu):
    """Equation 1: token by token, expert by expert; no work for a zero gate."""
    outputs = np.zeros((x.shape[0], kernels[-1].shape[2]))
    for n in range(x.shape[0]):
        for e in range(dense_gates.shape[1]):
            if dense_gates[n, e] != 0.0:
                own = [kernel[e] for kernel in kernels]
                own_biases = None if biases is None else [bias[e] for bias in biases]
                answer = feed_forward(x[n], own, own_biases, activation)
                outputs[n] += dense_gates[n, e] * answer
    return outputs


def noisy_top_k_mixture(x, gate_kernel, noise_kernel, noise, kernels, k, epsilon=1e-2):
    """The whole layer in training: outputs, importance and load."""
    clean = x @ gate_kernel
    stddev = softplus(x @ noise_kernel) + epsilon
    noisy = clean + noise * stddev
    gates = top_k_gates(noisy, k)
    return (
        mixture(x, gates, kernels),
        gates.sum(axis=0),
        prob_in_top_k(clean, noisy, stddev, k).sum(axis=0),
    )


def lstm_step(x, h, c, kernel, recurrent_kernel, bias, projection):
    """One step of a projected LSTM, gates in the order i, f, g, o."""

    def sigmoid(a):
        return 1.0 / (1.0 + np.exp(-a))

    i, f, g, o = np.split(x @ kernel + h @ recurrent_kernel + bias, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return (sigmoid(o) * np.tanh(c)) @ projection, c


def numerical_gradients(function, arrays, step=1e-6):
    """Central differences of a scalar function with respect to every array."""
    gradients = []
    for position, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            values = []
            for sign in (1.0, -1.0):
                moved = array.copy()
                moved[index] += sign * step
                changed = [*arrays[:position], moved, *arrays[position + 1 :]]
                values.append(function(*changed))
            gradient[index] = (values[0] - values[1]) / (2.0 * step)
        gradients.append(gradient)
    return gradients
