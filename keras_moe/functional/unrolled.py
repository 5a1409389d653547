"""The recurrence of a mixture without a loop, where no gradient of one can be had.

As `moe_lstm`, with one graph of every step and a dispatcher, by which rows travel to the
devices of their experts and back in every step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_moe.functional.dispatching import Dispatcher
from keras_moe.functional.lstm import Activation, lstm_step
from keras_moe.functional.recurrent import MoELSTMResult, verify_recurrent_gating
from keras_moe.types import GateStatistics, at_least_float32


def unrolled_moe_lstm(
    inputs: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    experts: Any,
    bias: tf.Tensor,
    route: Callable[..., Any],
    dispatcher: Dispatcher,
    *,
    weights: Sequence[tf.Tensor] = (),
    noise: tf.Tensor | None = None,
    mask: tf.Tensor | None = None,
    activation: Activation = tf.tanh,
    recurrent_activation: Activation = tf.sigmoid,
) -> MoELSTMResult:
    """Runs an LSTM whose weight matrix is a mixture, without a loop.

    Args:
        inputs: `(time, batch, D)` float, of a known number of steps.
        h: `(batch, units)` float, the state before the first step.
        c: `(batch, units)` float, likewise.
        experts: The matrices, as the dispatcher takes experts: of rows
            `(rows, D + units)` they make `(rows, 4 * units)`.
        bias: `(4 * units,)` float.
        route: The gate, as for `moe_lstm`.
        dispatcher: What takes rows to the experts.
        weights: As for `moe_lstm`.
        noise: `(time, batch, ...)` float handed to `route` step by step, or None.
        mask: `(time, batch)` bool or None. Where False a step keeps the state, and
            counts in no statistic.
        activation: As for `lstm_step`.
        recurrent_activation: As for `lstm_step`.

    Returns:
        A `MoELSTMResult`.

    Raises:
        ValueError: The number of steps is not known, or the gate is of another kind.

    Reference:
        Shazeer et al. 2017, section 3.1.
    """
    num_steps = inputs.shape[0]
    if not num_steps:
        raise ValueError(
            "`inputs` of an unrolled recurrence must have a known number of time steps, "
            f"at least 1. Received: inputs.shape={inputs.shape}. Pad sequences to one "
            "length."
        )
    steps = [
        [None] * num_steps if each is None else tf.unstack(each, num=num_steps)
        for each in (inputs, noise, mask)
    ]
    hidden, statistics, kept = [], [], []
    for x, noise_t, mask_t in zip(*steps, strict=True):
        u = tf.concat([x, h], axis=-1)
        chosen = route(u, noise_t, mask_t, *weights)
        verify_recurrent_gating(chosen)
        z = dispatcher.mix(experts, u, chosen, mask_t).outputs
        h_new, c_new = lstm_step(z + bias, c, activation, recurrent_activation)
        if mask_t is not None:
            # Of one shape: DTensor takes no other.
            real = mask_t[:, tf.newaxis] | tf.zeros_like(h, tf.bool)
            h_new, c_new = tf.where(real, h_new, h), tf.where(real, c_new, c)
        h, c = h_new, c_new
        hidden.append(h)
        statistics.append(chosen.statistics)
        if chosen.choices_kept:
            kept.append(chosen.choices_kept)
    dtype = at_least_float32(h.dtype)
    importance, load, counts = (
        tf.add_n(each) for each in zip(*statistics, strict=True)
    )
    sums = GateStatistics(tf.cast(importance, dtype), tf.cast(load, dtype), counts)
    choices = tuple(tf.add_n(each) for each in zip(*kept, strict=True))
    return MoELSTMResult(tf.stack(hidden), h, c, sums, choices)
