"""FactoredAdam in NumPy float64, one expert after the other."""

import numpy as np


def factored_adam(weights, gradients, rate, beta_2, epsilon):
    """Weights `(E, in, out)` after one update for each of the gradients."""
    weights = np.array(weights, np.float64)
    for expert in range(weights.shape[0]):
        rows = np.zeros(weights.shape[1])
        columns = np.zeros(weights.shape[2])
        for t, gradient in enumerate(gradients, 1):
            g = np.asarray(gradient[expert], np.float64)
            for i in range(rows.size):
                rows[i] = beta_2 * rows[i] + (1 - beta_2) * np.mean(g[i] ** 2)
            for j in range(columns.size):
                columns[j] = beta_2 * columns[j] + (1 - beta_2) * np.mean(g[:, j] ** 2)
            mean = np.mean(columns)
            if mean == 0:
                continue
            second = np.outer(rows, columns) / mean / (1 - beta_2**t)
            weights[expert] -= rate * g / (np.sqrt(second) + epsilon)
    return weights


def factored_adam_of_chosen(weights, gradients, rate, beta_2, epsilon, decays):
    """The same, expert by expert and only those with a gradient.

    Returns weights and averages over rows and columns; those of the other experts decay,
    or stay as they are.
    """
    weights = np.array(weights, np.float64)
    rows, columns = np.zeros(weights.shape[:2]), np.zeros(weights.shape[::2])
    for t, gradient in enumerate(gradients, 1):
        for e, g in enumerate(gradient):
            if not np.any(g):
                rows[e] *= beta_2 if decays else 1.0
                columns[e] *= beta_2 if decays else 1.0
                continue
            rows[e] = beta_2 * rows[e] + (1 - beta_2) * (g**2).mean(axis=1)
            columns[e] = beta_2 * columns[e] + (1 - beta_2) * (g**2).mean(axis=0)
            second = np.outer(rows[e], columns[e]) / rows[e].mean() / (1 - beta_2**t)
            weights[e] -= rate * g / (np.sqrt(second) + epsilon)
    return weights, rows, columns


def adam(weights, gradients, rate, beta_1, beta_2, epsilon):
    """Adam as in Kingma and Ba 2015, algorithm 1, with Keras' epsilon.

    Keras adds epsilon to the root of the uncorrected second moment.
    """
    weights = np.array(weights, np.float64)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for t, gradient in enumerate(gradients, 1):
        first = beta_1 * first + (1 - beta_1) * gradient
        second = beta_2 * second + (1 - beta_2) * gradient**2
        alpha = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        weights -= alpha * first / (np.sqrt(second) + epsilon)
    return weights


def adam_of_rows(weights, gradients, rate, beta_1, beta_2, epsilon):
    """Adam on the rows that are looked up; the others keep weights and moments.

    Each gradient is a list of `(row, values)`, in which a row may stand twice.
    """
    weights = np.array(weights, np.float64)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for t, looked_up in enumerate(gradients, 1):
        for row in {row for row, _ in looked_up}:
            g = sum(np.asarray(v, np.float64) for r, v in looked_up if r == row)
            first[row] = beta_1 * first[row] + (1 - beta_1) * g
            second[row] = beta_2 * second[row] + (1 - beta_2) * g**2
            alpha = rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
            weights[row] -= alpha * first[row] / (np.sqrt(second[row]) + epsilon)
    return weights


def adam_of_rows_that_catch_up(weights, gradients, rate, beta_1, beta_2, epsilon):
    """As `adam_of_rows`; a row that is read first makes the moves that it has missed."""
    weights = np.array(weights, np.float64)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    last = np.zeros(len(weights), int)

    def size(t):
        return rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)

    for t, looked_up in enumerate(gradients, 1):
        for row in {row for row, _ in looked_up}:
            between = t - 1 - last[row]
            missed = np.arange(1, between + 1)
            shares = (beta_1 / np.sqrt(beta_2)) ** missed
            if shares.sum():
                mean = np.sum(missed * shares) / shares.sum()
                move = first[row] / (np.sqrt(second[row]) + epsilon)
                weights[row] -= size(last[row] + mean) * shares.sum() * move
            first[row] *= beta_1**between
            second[row] *= beta_2**between
            g = sum(np.asarray(v, np.float64) for r, v in looked_up if r == row)
            first[row] = beta_1 * first[row] + (1 - beta_1) * g
            second[row] = beta_2 * second[row] + (1 - beta_2) * g**2
            weights[row] -= size(t) * first[row] / (np.sqrt(second[row]) + epsilon)
            last[row] = t
    return weights
