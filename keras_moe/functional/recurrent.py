"""An LSTM whose weight matrices are a mixture of experts (section 3.1).

The recurrence visits the steps one by one, but little has to stay inside it:

* importance and load are summed over the steps and leave the loop as values, so
  the losses are formed outside, over all steps at once;
* the kernels' gradient is not added up step by step, which would write all
  experts' weights once a step. The loop yields the gradient at the
  pre-activations, and one product over all steps and tokens, sorted by expert,
  gives that of the kernels;
* with segments, only the states at their borders are kept, and a segment is
  computed again when its gradient is needed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import ops
from keras_moe.functional.feed_forward import feed_forward_experts
from keras_moe.functional.lstm import Activation, lstm_step
from keras_moe.functional.slot_runs import run_in_slots
from keras_moe.functional.static_slots import SlotPlan, make_plan_here
from keras_moe.types import (
    DispatchPlan,
    GateStatistics,
    GatingResult,
    at_least_float32,
)

Gate = Callable[..., GatingResult]


class MoELSTMResult(NamedTuple):
    """What `moe_lstm` returns.

    Attributes:
        hidden: `(time, batch, units)`. The state h after every step; a masked
            step repeats the one before.
        h: `(batch, units)`. The last h.
        c: `(batch, units)`. The last c.
        statistics: `GateStatistics` over all steps that are not masked.
        choices_kept: `GatingResult.choices_kept` over the same steps.
    """

    hidden: tf.Tensor
    h: tf.Tensor
    c: tf.Tensor
    statistics: GateStatistics
    choices_kept: tuple = ()


def mixed_product(
    inputs: tf.Tensor, kernels: tf.Tensor, gates: tf.Tensor, plan: DispatchPlan
) -> tf.Tensor:
    """Multiplies every token by its own mixture of matrices.

    $z = \\sum_i G(x)_i \\, x W_i$

    Only the k chosen products are formed.

    Args:
        inputs: `(N, D)` float.
        kernels: `(E, D, out)` float.
        gates: Float, shape of `plan.positions`.
        plan: Dropless `DispatchPlan`.

    Returns:
        `(N, out)`.

    Reference:
        Shazeer et al. 2017, equation 1, with linear experts.
    """
    if isinstance(plan, SlotPlan):
        return run_in_slots(tf.matmul, inputs, plan, [kernels], gates=gates)
    rows = feed_forward_experts(plan.dispatch(inputs), [kernels], counts=plan.counts)
    return plan.combine(rows, gates, tf.shape(inputs)[0])


def moe_lstm(
    inputs: tf.Tensor,
    h: tf.Tensor,
    c: tf.Tensor,
    kernels: tf.Tensor,
    bias: tf.Tensor,
    route: Gate,
    *,
    weights: Sequence[tf.Tensor] = (),
    noise: tf.Tensor | None = None,
    mask: tf.Tensor | None = None,
    activation: Activation = tf.tanh,
    recurrent_activation: Activation = tf.sigmoid,
    segment_length: int | None = None,
    keep_steps: bool = True,
) -> MoELSTMResult:
    """Runs an LSTM whose weight matrix is a mixture, over a whole sequence.

    With $u_t = [x_t, h_{t-1}]$:
    $z_t = \\sum_i G(u_t)_i \\, u_t W_i + b$, and from $z_t$ the usual LSTM step.

    Args:
        inputs: `(time, batch, D)` float.
        h: `(batch, units)` float, the state before the first step.
        c: `(batch, units)` float, likewise.
        kernels: `(E, D + units, 4 * units)` float.
        bias: `(4 * units,)` float.
        route: The gate, `route(u, noise, mask, *weights)`: maps `u`
            `(batch, D + units)`, the noise of the step and its mask to a
            `GatingResult` in which every token has the same number of experts.
            It must be a pure function: with segments it runs twice.
        weights: Float tensors handed to `route`, which get a gradient.
            Defaults to none.
        noise: `(time, batch, ...)` float handed to `route` step by step, or
            None.
        mask: `(time, batch)` bool or None. Where False a step keeps the state,
            and counts in no statistic.
        activation: As for `lstm_step`.
        recurrent_activation: As for `lstm_step`.
        segment_length: Int or None. Steps between the states that are kept for
            the backward pass; the rest is computed again there. Memory grows
            with `time / segment_length + segment_length` instead of `time`, for
            about a third more operations; gradients are the same. None keeps
            everything.
        keep_steps: Whether, without segments, what the steps compute is kept for
            the backward pass. False computes all steps again there; a graph
            that is to be saved needs it, since a SavedModel holds no gradient
            that refers to values inside the graph. Defaults to True.

    Returns:
        A `MoELSTMResult`. Gradients reach `inputs`, `h`, `c`, `kernels`,
        `bias` and `weights`.

    Raises:
        ValueError: `segment_length` is not positive, or the gate is of another
            kind.

    Reference:
        Shazeer et al. 2017, section 3.1; the segments follow Gruslys et al.
        2016, "Memory-efficient backpropagation through time".
    """
    functions = activation, recurrent_activation
    route, has_noise = _observed(route)
    if noise is not None:
        steps = [*inputs.shape[:2], *noise.shape[2:]]
        checks.verify_shape(steps, "with the steps of `inputs`", noise=noise)
    if segment_length is None:
        run = _run_of(route, functions, recompute=not keep_steps)
        found = run(noise, mask, inputs, h, c, kernels, bias, *weights)
        return _result(has_noise, *found)
    run = _run_of(route, functions, recompute=True)
    num_steps = tf.shape(inputs)[0]
    num_segments = -(-num_steps // segment_length)
    if mask is None:
        mask = tf.ones(tf.shape(inputs)[:2], tf.bool)

    def in_segments(x):
        """`(time, ...) -> (segments, segment_length, ...)`, as an array to read."""
        padding = [[0, num_segments * segment_length - num_steps]]
        padded = tf.pad(x, padding + [[0, 0]] * (x.shape.rank - 1))
        shape = tf.concat([[num_segments, segment_length], tf.shape(x)[1:]], axis=0)
        segments = tf.reshape(padded, shape)
        segments.set_shape([None, segment_length, *x.shape[1:]])
        return _array_of(segments)

    read = [x if x is None else in_segments(x) for x in (inputs, noise, mask)]

    def body(i, h, c, sums, hidden):
        x, noise, kept = (array if array is None else array.read(i) for array in read)
        states, h_new, c_new, *more = run(noise, kept, x, h, c, kernels, bias, *weights)
        h_new.set_shape(h.shape)
        c_new.set_shape(c.shape)
        sums = [a + b for a, b in zip(sums, more, strict=True)]
        return i + 1, h_new, c_new, sums, hidden.write(i, states)

    _, h_last, c_last, sums, hidden = tf.while_loop(
        lambda i, *_: i < num_segments,
        body,
        (
            tf.constant(0),
            h,
            c,
            _zero_sums(kernels),
            tf.TensorArray(h.dtype, num_segments),
        ),
        maximum_iterations=num_segments if ops.is_compiled_by_xla() else None,
    )
    hidden = _merge_steps(hidden.stack())[:num_steps]
    hidden.set_shape([inputs.shape[0], *h.shape])
    return _result(has_noise, hidden, h_last, c_last, *sums)


def _observed(route):
    """The gate, checked; and a list that says of each call whether it had noise."""
    has_noise = []

    def observed(*arguments):
        chosen = route(*arguments)
        verify_recurrent_gating(chosen)
        has_noise.append(bool(chosen.choices_kept))
        return chosen

    return observed, has_noise


def _result(has_noise, hidden, h, c, importance, load, counts, kept):
    statistics = GateStatistics(importance, load, tf.cast(counts, tf.int32))
    kept = tuple(tf.unstack(kept)) if any(has_noise) else ()
    return MoELSTMResult(hidden, h, c, statistics, kept)


def _zero_sums(kernels):
    """Importance, load, counts and choices kept before the first step."""
    num_experts = kernels.shape[0]
    dtype = at_least_float32(kernels.dtype)
    zeros = tf.zeros([num_experts], dtype)
    counts = tf.zeros([num_experts], tf.int64)
    return [zeros, zeros, counts, tf.zeros([2], dtype)]


def _run_of(route, functions, recompute):
    """The recurrence over some steps, with a gradient of its own."""

    def run(noise, mask, *arguments):
        def forward(x, h, c, kernels, bias, *weights):
            # The bias once a step and token: its gradient is then that of the
            # pre-activations.
            shape = tf.concat([tf.shape(x)[:2], tf.shape(bias)], axis=0)
            biases = tf.broadcast_to(bias, shape)
            biases.set_shape([*x.shape[:2], *bias.shape])
            with tf.GradientTape() as tape:
                sources = [x, h, c, biases, *weights]
                tape.watch(sources)

                def gate(*step):
                    return route(*step, *weights)

                states, choices = _loop(
                    gate, functions, x, h, c, kernels, biases, noise, mask
                )
            return tape, sources, states, choices

        @tf.custom_gradient
        def recurrence(x, h, c, kernels, bias, *weights):
            results = forward(x, h, c, kernels, bias, *weights)
            outputs = tuple(results[2])
            if recompute:
                results = None

            def grad(*upstream):
                kept = results
                if recompute:
                    # The dependency keeps the graph optimizer from taking the
                    # values of the forward pass, which would have to be kept.
                    with tf.control_dependencies(upstream[:1]):
                        again = (x, h, c, kernels, bias, *weights)
                        kept = forward(*(tf.identity(each) for each in again))
                tape, sources, states, choices = kept
                d_x, d_h, d_c, d_z, *d_weights = tape.gradient(
                    states[:5],
                    sources,
                    list(upstream[:5]),
                    unconnected_gradients="zero",
                )
                before = tf.concat([h[tf.newaxis], states[0][:-1]], axis=0)
                d_kernels = _kernel_gradient(
                    tf.concat([x, before], axis=-1), kernels, choices, d_z
                )
                d_bias = tf.reduce_sum(d_z, axis=[0, 1])
                return d_x, d_h, d_c, d_kernels, d_bias, *d_weights

            return outputs, grad

        return recurrence(*arguments)

    return run


def _loop(route, functions, x, h, c, kernels, biases, noise, mask):
    """Steps of the recurrence, in which kernels are constants.

    Returns:
        `[hidden, h, c, importance, load, counts, choices kept]` and, of every step,
        the gates and the experts chosen.
    """
    num_steps = tf.shape(x)[0]
    read = [None if each is None else _array_of(each) for each in (noise, mask)]
    inputs, added = _array_of(x), _array_of(biases)

    def body(t, h, c, sums, hidden, gates, experts):
        noise_t, mask_t = (each if each is None else each.read(t) for each in read)
        u = tf.concat([inputs.read(t), h], axis=-1)
        chosen = route(u, noise_t, mask_t)
        plan = make_plan_here(chosen.expert_indices, kernels.shape[0])
        z = mixed_product(u, tf.stop_gradient(kernels), chosen.gates, plan)
        h_new, c_new = lstm_step(z + added.read(t), c, *functions)
        if mask_t is not None:
            h_new = tf.where(mask_t[:, tf.newaxis], h_new, h)
            c_new = tf.where(mask_t[:, tf.newaxis], c_new, c)
        h_new.set_shape(h.shape)
        c_new.set_shape(c.shape)
        more = *chosen.statistics, chosen.choices_kept or (0.0, 0.0)
        sums = [a + tf.cast(b, a.dtype) for a, b in zip(sums, more, strict=True)]
        return (
            t + 1,
            h_new,
            c_new,
            sums,
            hidden.write(t, h_new),
            gates.write(t, tf.stop_gradient(chosen.gates)),
            experts.write(t, tf.cast(chosen.expert_indices, tf.int64)),
        )

    sums = _zero_sums(kernels)
    _, h_last, c_last, sums, hidden, gates, experts = tf.while_loop(
        lambda t, *_: t < num_steps,
        body,
        (
            tf.constant(0),
            h,
            c,
            sums,
            tf.TensorArray(h.dtype, num_steps, element_shape=h.shape),
            tf.TensorArray(sums[0].dtype, num_steps),
            tf.TensorArray(tf.int64, num_steps),
        ),
        # Without, XLA cannot compile a gradient; with, a GPU is asked at every step.
        maximum_iterations=num_steps if ops.is_compiled_by_xla() else None,
    )
    hidden = hidden.stack()
    hidden.set_shape([x.shape[0], *h.shape])
    return [hidden, h_last, c_last, *sums], (gates, experts)


def _kernel_gradient(u, kernels, choices, d_z):
    """Of all steps at once: every expert's rows times their gradients."""
    gates, experts = (_merge_steps(array.stack()) for array in choices)
    plan = make_plan_here(experts, kernels.shape[0])
    kernels = tf.identity(kernels)  # of this graph: a tape misses captured tensors
    with tf.GradientTape() as tape:
        tape.watch(kernels)
        z = mixed_product(_merge_steps(u), kernels, gates, plan)
    return tape.gradient(z, kernels, _merge_steps(d_z))


def _merge_steps(x):
    """`(time, batch, ...) -> (time * batch, ...)`."""
    return tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], axis=0))


def _array_of(x):
    """Reading an array costs the gradient one slice, not one whole tensor."""
    return tf.TensorArray(x.dtype, tf.shape(x)[0], element_shape=x.shape[1:]).unstack(x)


def verify_recurrent_gating(chosen: GatingResult) -> None:
    """Raises unless a gate can be used inside a recurrence.

    Args:
        chosen: What the gate returned.

    Raises:
        ValueError: It is no `GatingResult`, tokens have different numbers of experts,
            or the gate has losses of its own.
    """
    if not isinstance(chosen, GatingResult):
        raise ValueError(
            "`gating` of a recurrent mixture must return a "
            f"keras_moe.types.GatingResult. Received: a {type(chosen).__name__}. Use "
            "NoisyTopKGating, TopKGating or SoftmaxGating."
        )
    if chosen.is_ragged or chosen.auxiliary_losses:
        raise ValueError(
            "`gating` of a recurrent mixture must give every token the same number "
            "of experts and have no losses of its own, such as the router z-loss. "
            f"Received: a gate with gates of rank {chosen.gates.shape.rank} and "
            f"{len(chosen.auxiliary_losses)} auxiliary losses. Use NoisyTopKGating, "
            "TopKGating or SoftmaxGating, with `z_loss_weight` and "
            "`switch_loss_weight` left out."
        )
