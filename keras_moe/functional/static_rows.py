"""Tokens into rows and back where both numbers are static: gathers in both directions.

Each row has one token at most, and each assignment one row at most. So the gradient of a
gather is a gather as well: no scatter, and the same result in every run. Indices may be
of any integer type, and are -1 for none.
"""

import tensorflow as tf

from keras_moe.functional.sorting import long_range


def gather_rows(
    tokens: tf.Tensor, token_indices: tf.Tensor, positions: tf.Tensor
) -> tf.Tensor:
    """The token of every row.

    Args:
        tokens: `(N, D)`.
        token_indices: `(..., )`, the token of every row.
        positions: `(N, K)`, the rows of every token, counted over all.

    Returns:
        `(..., D)`, zeros in rows without a token.
    """
    token_indices, positions = _long(token_indices), _long(positions)

    @tf.custom_gradient
    def run(tokens):
        def grad(dy):
            return tf.reduce_sum(_at(dy, positions), axis=1)

        return _at(tokens, token_indices), grad

    return run(tokens)


def sum_rows(
    rows: tf.Tensor, gates: tf.Tensor, token_indices: tf.Tensor, positions: tf.Tensor
) -> tf.Tensor:
    """The rows of every token, weighted and summed.

    Args:
        rows: `(..., D)`.
        gates: `(N, K)`, in the type of `rows`.
        token_indices: As for `gather_rows`.
        positions: As for `gather_rows`.

    Returns:
        `(N, D)`, zeros for tokens without rows.
    """
    token_indices, positions = _long(token_indices), _long(positions)

    @tf.custom_gradient
    def run(rows, gates):
        def grad(dy):
            own = _of_rows(gates, token_indices, positions)[..., tf.newaxis]
            d_rows = _where(token_indices >= 0, _gather(dy, token_indices) * own)
            # A product, of which XLA writes only the sums.
            d_gates = tf.matmul(_gather(rows, positions), dy[..., tf.newaxis])
            return d_rows, _where(positions >= 0, tf.squeeze(d_gates, axis=-1))

        chosen = _at(rows, positions) * gates[..., tf.newaxis]
        return tf.reduce_sum(chosen, axis=1), grad

    return run(rows, gates)


def _of_rows(gates, token_indices, positions):
    """The gate of every row; 0 in those without a token, which no position names."""
    at = tf.reshape(long_range(tf.size(token_indices)), tf.shape(token_indices))
    tokens = tf.maximum(token_indices, 0)
    is_it = tf.gather(positions, tokens) == at[..., tf.newaxis]
    return tf.reduce_sum(_where(is_it, tf.gather(gates, tokens)), axis=-1)


def _at(values, indices):
    """Of `(..., D)` what stands at indices over the leading axes, zeros at -1."""
    return _where(indices >= 0, _gather(values, indices))


def _gather(values, indices):
    """The same with anything at -1."""
    values = tf.reshape(values, [-1, values.shape[-1]])
    return tf.gather(values, tf.maximum(indices, 0))


def _where(condition, values):
    """Zeros where not, which NaN times zero would not be."""
    if values.shape.rank > condition.shape.rank:
        condition = condition[..., tf.newaxis]
    return tf.where(condition, values, tf.zeros([], values.dtype))


def _long(indices):
    return tf.cast(indices, tf.int64)
