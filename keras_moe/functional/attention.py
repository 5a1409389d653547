"""The multiplicative attention of appendix G."""

import tensorflow as tf


def attention_keys(
    memory: tf.Tensor, key_kernel: tf.Tensor, scale: tf.Tensor
) -> tf.Tensor:
    """What of the scores depends on the memory alone: $V \\odot \\tanh(x U)$.

    Args:
        memory: `(batch, source, features)` float, the positions x to attend to.
        key_kernel: `(features, units)` float, U.
        scale: `(units,)` float, V.

    Returns:
        `(batch, source, units)`.

    Reference:
        Shazeer et al. 2017, equation 22.
    """
    return scale * tf.tanh(tf.matmul(memory, key_kernel))


def attention_scores(
    query: tf.Tensor, keys: tf.Tensor, query_kernel: tf.Tensor
) -> tf.Tensor:
    """Scores of all positions for all queries, in one matrix product.

    $A(x_i, y_j) = \\sum_d V_d \\tanh((x_i U)_d) \\tanh((y_j W)_d)$

    Args:
        query: `(batch, target, features)` float, the queries y.
        keys: `(batch, source, units)` float, from `attention_keys`.
        query_kernel: `(features, units)` float, W.

    Returns:
        `(batch, target, source)`.

    Reference:
        Shazeer et al. 2017, equation 22.
    """
    return tf.matmul(tf.tanh(tf.matmul(query, query_kernel)), keys, transpose_b=True)


def masked_softmax(scores: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Softmax over the last axis among the positions that are marked True.

    Args:
        scores: `(..., source)` float.
        mask: Bool tensor that broadcasts to `scores`, or None for all positions.

    Returns:
        The shape of `scores`. Exactly 0 where the mask is False; a row without
        any True is 0 throughout, and has no gradient.
    """
    if mask is None:
        return tf.nn.softmax(scores)
    mask = tf.broadcast_to(mask, tf.shape(scores))
    least = tf.constant(scores.dtype.min, scores.dtype)
    highest = tf.reduce_max(tf.where(mask, scores, least), axis=-1, keepdims=True)
    shifted = tf.where(mask, scores - tf.stop_gradient(highest), tf.zeros_like(scores))
    weights = tf.where(mask, tf.exp(shifted), tf.zeros_like(scores))
    return tf.math.divide_no_nan(
        weights, tf.reduce_sum(weights, axis=-1, keepdims=True)
    )
