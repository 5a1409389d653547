"""Choosing the next token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_moe import checks


def sample_tokens(
    logits: tf.Tensor,
    uniform: tf.Tensor,
    *,
    temperature: Any = 1.0,
    top_k: Any = None,
    forbidden_tokens: Sequence[int] = (),
) -> tf.Tensor:
    """Draws one token for each row, by inversion of its distribution function.

    A row depends on nothing but its own arguments: whatever shares its batch,
    the same logits and the same uniform number give the same token.

    Args:
        logits: `(batch, vocabulary)` float.
        uniform: `(batch,)` float in [0, 1), such as a column of
            `row_uniforms`.
        temperature: Float of at least 0, or a `(batch,)` tensor of them.
            Divides the logits; 0 takes the largest. Defaults to `1.0`.
        top_k: Int, None, or a `(batch,)` int tensor where 0 means None. Draws
            among the `top_k` largest logits only; all that equal the last of
            them belong to them. Defaults to `None`: all.
        forbidden_tokens: Ids that are never drawn. Defaults to `()`.

    Returns:
        `(batch,)` int32.

    Raises:
        ValueError: A shape does not fit, or, where it is known, `temperature` is
            negative, `top_k` is not within the size of the vocabulary, `uniform` is
            not within [0, 1), or no token is left that is not forbidden.
    """
    logits, uniform = tf.cast(logits, tf.float32), tf.cast(uniform, tf.float32)
    size = logits.shape[-1]
    checks.verify_shape([None, size], "(batch, vocabulary)", logits=logits)
    checks.verify_shape(logits.shape[:1], "one number a row", uniform=uniform)
    if not tf.is_symbolic_tensor(uniform):
        for number in uniform.numpy():
            checks.verify_number(number, "uniform", "[0, 1)")
    temperature, top_k, forbidden_tokens = verify_sampling(
        temperature, top_k, size, forbidden_tokens, logits.shape[0]
    )
    rows = tf.shape(logits)[:1]
    temperature = tf.broadcast_to(tf.cast(temperature, tf.float32), rows)
    top_k = tf.broadcast_to(tf.cast(0 if top_k is None else top_k, tf.int32), rows)
    if len(forbidden_tokens):
        forbidden = tf.reduce_any(
            tf.one_hot(forbidden_tokens, size, on_value=True, off_value=False),
            axis=0,
        )
        logits = tf.where(forbidden, logits.dtype.min, logits)
    greedy = tf.argmax(logits, axis=-1, output_type=tf.int32)
    is_greedy = tf.equal(temperature, 0.0) | tf.equal(top_k, 1)
    kept = tf.where(
        logits < _least_kept(logits, top_k), tf.zeros_like(logits), tf.ones_like(logits)
    )
    divisor = tf.where(is_greedy, tf.ones_like(temperature), temperature)
    shifted = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    weights = kept * tf.exp(shifted / divisor[:, tf.newaxis])
    cumulative = tf.cumsum(weights, axis=-1)
    # The first token whose sum exceeds the drawn part of the total: its own
    # weight is above zero.
    drawn_part = uniform[:, tf.newaxis] * cumulative[:, -1:]
    drawn = tf.reduce_sum(tf.cast(cumulative <= drawn_part, tf.int32), axis=-1)
    return tf.where(is_greedy, greedy, tf.minimum(drawn, size - 1))


def verify_sampling(
    temperature: Any, top_k: Any, size: int, forbidden_tokens: Any, rows: int | None
) -> tuple[Any, Any, tuple[int, ...]]:
    """Temperature, `top_k` and forbidden ids of `sample_tokens`.

    Raises:
        ValueError: One is out of range, as far as values are known, or has not one
            value for each of `rows`.
    """
    if np.ndim(top_k) == 0 and top_k is not None and not tf.is_tensor(top_k):
        if checks.verify_int(top_k, "top_k") > size:
            raise ValueError(
                "`top_k` must be at most the size of the vocabulary. "
                f"Received: top_k={top_k}, vocabulary size={size}."
            )
    elif top_k is not None:
        top_k = checks.verify_ids(top_k, "top_k", size + 1)
        _verify_rows(top_k, "top_k", rows)
    if tf.is_tensor(temperature) or np.ndim(temperature):
        temperature = tf.cast(temperature, tf.float32)
        _verify_rows(temperature, "temperature", rows)
    if not tf.is_symbolic_tensor(temperature):
        for number in np.ravel(temperature).tolist():
            checks.verify_number(number, "temperature")
    forbidden = np.asarray(checks.verify_ids(forbidden_tokens, "forbidden_tokens"))
    known = sorted(set(forbidden.ravel().tolist()))
    inside = not known or 0 <= known[0] <= known[-1] < size
    if forbidden.ndim != 1 or len(known) == size or not inside:
        raise ValueError(
            f"`forbidden_tokens` must be ids below {size}, not all of them. Received: "
            f"forbidden_tokens={forbidden_tokens!r}. Leave one to draw."
        )
    return temperature, top_k, tuple(known)


def _verify_rows(values, name, rows):
    shape = [rows] if len(values.shape) else []
    checks.verify_shape(shape, "one value, or one a row", **{name: values})


def _least_kept(logits, top_k):
    """`(batch, 1)`: the `top_k`-th largest logit, minus infinity for 0."""
    top_k = tf.minimum(top_k, logits.shape[-1])
    most = tf.maximum(tf.reduce_max(top_k), 1)
    largest = tf.math.top_k(logits, k=most).values
    least = tf.gather(largest, tf.maximum(top_k - 1, 0), batch_dims=1)
    least = tf.where(tf.equal(top_k, 0), -float("inf"), least)
    return least[:, tf.newaxis]


def row_uniforms(seeds: tf.Tensor, num: Any) -> tf.Tensor:
    """Uniform numbers, for each row from its own seed.

    Args:
        seeds: `(batch,)` int64.
        num: Int or scalar int tensor. A larger one only adds columns.

    Returns:
        `(batch, num)` float32 in [0, 1).
    """

    def draw(seed):
        return tf.random.stateless_uniform(
            [num], tf.stack([seed, tf.zeros_like(seed)]), alg="philox"
        )

    uniforms = tf.map_fn(draw, tf.cast(seeds, tf.int64), fn_output_signature=tf.float32)
    # Without rows `map_fn` does not know their length.
    return tf.reshape(uniforms, tf.stack([tf.shape(seeds)[0], num]))
