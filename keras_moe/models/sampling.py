"""Choosing the next token."""

from collections.abc import Sequence

import tensorflow as tf

from keras_moe import checks


def sample_tokens(
    logits: tf.Tensor,
    seed: tf.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    forbidden_tokens: Sequence[int] = (),
) -> tf.Tensor:
    """Draws one token for each row.

    Args:
        logits: `(batch, vocabulary)` float.
        seed: `(2,)` int, for the stateless random op.
        temperature: Float of at least 0. Divides the logits; 0 takes the
            largest. Defaults to `1.0`.
        top_k: Int or None. Draws among the `top_k` largest logits only.
            Defaults to `None`.
        forbidden_tokens: Ids that are never drawn. Defaults to `()`.

    Returns:
        `(batch,)` int32.

    Raises:
        ValueError: `temperature` is negative, or `top_k` is below 1 or above
            the size of the vocabulary.
    """
    temperature = checks.verify_weight(temperature, "temperature")
    logits = tf.cast(logits, tf.float32)
    size = logits.shape[-1]
    if len(forbidden_tokens):
        forbidden = tf.reduce_any(
            tf.one_hot(list(forbidden_tokens), size, on_value=True, off_value=False),
            axis=0,
        )
        logits = tf.where(forbidden, logits.dtype.min, logits)
    if temperature == 0.0:
        return tf.argmax(logits, axis=-1, output_type=tf.int32)
    logits /= temperature
    if top_k is not None:
        top_k = checks.verify_positive_int(top_k, "top_k")
        if top_k > size:
            raise ValueError(
                "`top_k` must be at most the size of the vocabulary. "
                f"Received: top_k={top_k}, vocabulary size={size}."
            )
        least = tf.math.top_k(logits, k=top_k).values[:, -1:]
        logits = tf.where(logits < least, logits.dtype.min, logits)
    drawn = tf.random.stateless_categorical(logits, 1, seed, dtype=tf.int32)
    return drawn[:, 0]
