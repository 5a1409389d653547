"""Masks of positions, and which of them a query may attend to."""

from typing import Any

import tensorflow as tf

from keras_moe import checks


def positions_from(start: Any, time: Any) -> tf.Tensor:
    """Positions of so many steps from `start` on.

    Args:
        start: Int, or int tensor `()` or `(batch,)`.
        time: Int or scalar int tensor.

    Returns:
        `(1, time)` or `(batch, time)` int32.
    """
    start = tf.reshape(tf.cast(start, tf.int32), [-1, 1])
    return start + tf.range(time)


def among(mask, key_mask):
    """`(batch, time)` and `(batch, source)`, or None -> `(batch, time, source)`."""
    rows = None if mask is None else mask[..., tf.newaxis]
    return both(rows, None if key_mask is None else key_mask[:, tf.newaxis])


def both(a, b):
    """Where both masks are True, of which None is True throughout."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def as_mask(mask, inputs, name):
    """A mask as bools, of which there is one a position of the inputs."""
    if mask is None:
        return None
    checks.verify_shape(inputs.shape[:2], "one value a position", **{name: mask})
    return tf.cast(mask, tf.bool)


def of_pairs(mask, query, keys):
    """An `attention_mask` as bools of rank 3, for `(batch, time, ...)` of both."""
    if mask is None:
        return None
    shape = (*query.shape[:2], keys.shape[1])
    return checks.verify_broadcast(tf.cast(mask, tf.bool), shape, "attention_mask")


def without_padding(x, mask):
    """Zeros at padding: a weight of 0 would not keep out what is not a number."""
    if mask is None:
        return x
    return tf.where(_over(mask, x), x, tf.zeros_like(x))


def _over(mask, x):
    """A mask with as many axes as `x`."""
    for _ in range(len(x.shape) - 2):
        mask = mask[..., tf.newaxis]
    return mask


def source(encoder_outputs, mask):
    """What is attended to without its padding, and the mask; of None both are None."""
    mask = as_mask(mask, encoder_outputs, "encoder_outputs_mask")
    return without_padding(encoder_outputs, mask), mask
