"""Cross-entropy of logits, in few passes over them."""

from typing import Any

import tensorflow as tf

from keras_moe.functional import ops

_IS_LOSSES = "_keras_moe_is_losses"


def as_losses(losses: tf.Tensor) -> tf.Tensor:
    """Marks cross-entropies of tokens, which stand in the place of their logits."""
    setattr(losses, _IS_LOSSES, True)
    return losses


def are_losses(predictions: Any) -> bool:
    """Whether these are no logits, but what `as_losses` has marked."""
    return getattr(predictions, _IS_LOSSES, False)


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Negative log-probability of each target under the softmax of its logits.

    $L_n = \\log \\sum_v e^{s_{n,v}} - s_{n,t_n}$

    The value and the gradients of
    `tf.nn.sparse_softmax_cross_entropy_with_logits`, whose kernel for CPUs takes five
    times as long as the softmax that this is made of.

    Args:
        logits: `(N, V)` floating point, s. `-inf` is a word of probability 0.
        targets: `(N,)` ints below V, t.

    Returns:
        `(N,)`, of the type of `logits`.

    Raises:
        ValueError: Shapes do not fit, `logits` are not floating point, or targets
            are not integers.

    Reference:
        Shazeer et al. 2017, appendix C.1.

    Example:

    >>> loss = keras_moe.functional.cross_entropy(tf.zeros((1, 4)), tf.constant([2]))
    >>> round(float(loss[0]), 4)
    1.3863
    """
    targets = tf.cast(targets, tf.int32)
    if ops.shapes_are_static() or not ops.values_are_here():
        # XLA fuses it, GPUs have a fast kernel, and a mesh knows how to shard it.
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)

    @tf.custom_gradient
    def run(logits):
        cells = tf.stack([tf.range(tf.shape(targets)[0]), targets], axis=1)
        losses = normalizer(logits, tf.nn.softmax(logits)) - tf.gather_nd(logits, cells)

        def grad(dy):
            # Written down again, and run once: so it has derivatives of its own.
            softmax = tf.nn.softmax(logits)
            return ops.add_at(softmax * dy[:, tf.newaxis], cells, -dy)

        return losses, grad

    return run(logits)


def normalizer(logits: tf.Tensor, softmax: tf.Tensor) -> tf.Tensor:
    """$\\log \\sum_v e^{s_v}$ of each row, of logits and their softmax: `(N,)`.

    Read off where the softmax is largest, at least 1 / V.
    """
    return tf.reduce_max(logits, axis=-1) - tf.math.log(tf.reduce_max(softmax, axis=-1))
