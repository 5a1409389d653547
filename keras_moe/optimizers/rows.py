"""Steps of the rows of a table, or of the experts of a stack, that have a gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe import engine
from keras_moe.optimizers import adam, factors
from keras_moe.types import at_least_float32


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


def apply(
    optimizer: Any,
    gradient: tf.IndexedSlices,
    variable: Any,
    slots: Sequence[Any],
    last_steps: Any,
    learning_rate: Any,
) -> None:
    """Adam on the rows of a table that have a gradient.

    Args:
        optimizer: A `FactoredAdam`.
        gradient: With a row for each look-up.
        variable: The table, `(rows, ...)`.
        slots: Its first and second moments, of its shape.
        last_steps: `(rows,)`, when each row was read, or None: what a row has missed is
            not done later.
        learning_rate: A number.
    """
    verify_place(optimizer.untouched_rows)
    # A row stands there for every look-up: its square is that of their sum.
    gradient = summed_by_row(gradient)
    values, read = tf.cast(gradient.values, variable.dtype), gradient.indices
    step = tf.cast(optimizer.iterations + 1, at_least_float32(variable.dtype))
    rate = tf.cast(learning_rate, variable.dtype)
    rates = Rates(rate, optimizer.beta_1, optimizer.beta_2, optimizer.epsilon)
    moments = Moments(*(read_rows(slot, read) for slot in slots))
    caught_up = tf.zeros((), variable.dtype)
    if last_steps is not None:
        last = read_rows(last_steps, read)
        caught_up, moments = catch_up(moments, last, step, rates)
        now = tf.fill(tf.shape(read), tf.cast(step, last.dtype))
        optimizer.assign(last_steps, tf.IndexedSlices(now, read))
    move, moments = adam_step(values, moments, step, rates)
    for slot, value in zip(slots, moments, strict=True):
        optimizer.assign(slot, tf.IndexedSlices(value, read))
    optimizer.assign_sub(variable, tf.IndexedSlices(move + caught_up, read))
    if _is_one_variable():
        factors.end_of_writes(adam.resource_of(variable))


def apply_factored(
    optimizer: Any,
    gradient: tf.IndexedSlices,
    variable: Any,
    slots: Sequence[Any],
    learning_rate: Any,
) -> None:
    """The step of a stack of kernels, of which some experts have a gradient.

    With a gradient of 0 a kernel stays and its averages decay, so this is the step of the
    dense gradient; but for `untouched_rows="keep"`, with which averages stay, too.

    Args:
        optimizer: A `FactoredAdam`, on one device.
        gradient: Of `(E, in, out)`, with the kernels of some experts.
        variable: The stack.
        slots: Its rows and columns, `(E, in)` and `(E, out)`.
        learning_rate: A number.
    """
    gradient = summed_by_row(gradient)
    values, chosen = tf.cast(gradient.values, variable.dtype), gradient.indices
    own = [read_rows(slot, chosen) for slot in slots]
    move, *new = optimizer.factored_step(values, learning_rate, own)
    for slot, value in zip(slots, new, strict=True):
        if optimizer.untouched_rows != "keep":
            optimizer.assign(slot, slot * tf.constant(optimizer.beta_2, slot.dtype))
        optimizer.assign(slot, tf.IndexedSlices(value, chosen))
    target = adam.resource_of(variable)
    factors.subtract_rows(target, chosen, move)
    factors.end_of_writes(target)


def read_rows(slot: Any, rows: tf.Tensor) -> tf.Tensor:
    """Rows of a slot. Of all of it one would get a copy after the first write of rows."""
    return tf.gather(adam.resource_of(slot) if _is_one_variable() else slot, rows)


def _is_one_variable():
    """Whether variables are what they seem: not one for each replica, nor on a mesh."""
    return factors.writes_in_place() and not tf.distribute.has_strategy()


def summed_by_row(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """The same gradient, in which no row stands twice.

    Args:
        gradient: `tf.IndexedSlices` with a row for each look-up.
    """
    rows, positions = tf.unique(gradient.indices)
    number = tf.size(rows)
    # Where each is alone they are in their order: nothing to add, and nothing is copied.
    values = tf.cond(
        tf.equal(number, tf.size(positions)),
        lambda: gradient.values,
        lambda: tf.math.unsorted_segment_sum(gradient.values, positions, number),
    )
    values.set_shape([None, *gradient.values.shape[1:]])
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
