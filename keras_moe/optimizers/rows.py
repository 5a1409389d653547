"""Adam on the rows of a table that a step has read."""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe import engine


class Rates(NamedTuple):
    """What a step of Adam goes by.

    Attributes:
        learning_rate: `()` float.
        beta_1: Float. Decay of the first moment.
        beta_2: Float. Decay of the second moment.
        epsilon: Float. Added to the root of the second moment.
    """

    learning_rate: tf.Tensor
    beta_1: float
    beta_2: float
    epsilon: float


class Moments(NamedTuple):
    """First and second moment of some rows, each `(rows, features)` or `(rows,)`."""

    first: tf.Tensor
    second: tf.Tensor


def is_sparse(gradient: Any) -> bool:
    """Whether a gradient is one of rows."""
    return isinstance(gradient, tf.IndexedSlices)


def verify_place(untouched_rows: str) -> None:
    """Raises where a step cannot write some rows of a table."""
    if engine.current().unrolls_loops:
        raise ValueError(
            "`untouched_rows` must be 'decay' on a mesh, where a step cannot write some "
            f"rows of a table. Received: {untouched_rows!r}. Leave it out, or use a "
            "`tf.distribute` strategy."
        )


def summed_by_row(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """The same gradient, in which no row stands twice.

    Args:
        gradient: `tf.IndexedSlices` with a row for each look-up.
    """
    rows, positions = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, positions, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)


def adam_step(
    gradient: tf.Tensor, moments: Moments, step: tf.Tensor, rates: Rates
) -> tuple[tf.Tensor, Moments]:
    """One step of Adam.

    Args:
        gradient: `(rows, features)`.
        moments: Those of before.
        step: `()` float32 or float64. Number of this step, from 1.
        rates: The `Rates`.

    Returns:
        What to subtract, and the new moments.
    """
    first = _towards(moments.first, gradient, rates.beta_1)
    second = _towards(moments.second, tf.square(gradient), rates.beta_2)
    rate = rates.learning_rate * tf.cast(_correction(step, rates), gradient.dtype)
    return rate * first / (tf.sqrt(second) + rates.epsilon), Moments(first, second)


def catch_up(
    moments: Moments, last: tf.Tensor, step: tf.Tensor, rates: Rates
) -> tuple[tf.Tensor, Moments]:
    """What Adam would have done to rows between their last step and this one.

    In each of the n steps between, Adam finds a gradient of 0: moments decay, and the
    first one moves the row on. With $m$, $v$ after step s and $\\rho = \\beta_1 /
    \\sqrt{\\beta_2}$ the sum of the moves is

    $\\alpha \\frac{m}{\\sqrt v + \\epsilon} \\sum_{j=1}^n \\rho^j$,

    where the step size $\\alpha$ is that of the mean step under the weights
    $\\rho^j$ at the present learning rate, and $\\epsilon$ decays with $\\sqrt v$.

    Args:
        moments: Of the rows, after their last step.
        last: `(rows,)` of the type of `step`. Number s of that step, 0 if there is none.
        step: `()` float32 or float64. Number of the present step, from 1.
        rates: The `Rates`. `beta_1` is below the root of `beta_2`.

    Returns:
        What to subtract, and the moments before the present step.
    """
    dtype = moments.first.dtype
    last = tf.reshape(last, [-1, *[1] * (moments.first.shape.rank - 1)])
    between = step - 1 - last
    ratio = rates.beta_1 / rates.beta_2**0.5
    left = _power(ratio, between)
    moves = ratio * (1 - left) / (1 - ratio)
    mean = 1 / (1 - ratio) - tf.math.divide_no_nan(between * left, 1 - left)
    moves = tf.cast(moves * _correction(last + mean, rates), dtype)
    move = moments.first / (tf.sqrt(moments.second) + rates.epsilon)
    decays = (_power(beta, between) for beta in (rates.beta_1, rates.beta_2))
    decayed = (m * tf.cast(d, dtype) for m, d in zip(moments, decays, strict=True))
    return rates.learning_rate * moves * move, Moments(*decayed)


def _towards(mean, value, beta):
    return mean + tf.cast(1 - beta, value.dtype) * (value - mean)


def _correction(step, rates):
    """Of moments that began at 0."""
    first, second = (1 - _power(beta, step) for beta in (rates.beta_1, rates.beta_2))
    return tf.sqrt(second) / first


def _power(base, exponent):
    return tf.pow(tf.cast(base, exponent.dtype), exponent)
