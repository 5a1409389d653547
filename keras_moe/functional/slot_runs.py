"""Runs experts by a plan of static slots: one batched product, and a loop for the rest."""

from collections.abc import Sequence

import tensorflow as tf

from keras_moe.functional import ops
from keras_moe.functional.recomputation import (
    Network,
    float_type,
    gradients_on,
    recomputed,
    watch,
)
from keras_moe.functional.sorting import MOST_GATHERED
from keras_moe.functional.static_slots import SlotPlan


def run_in_slots(
    network: Network,
    inputs: tf.Tensor,
    plan: SlotPlan,
    weights: Sequence[tf.Tensor],
    *,
    gates: tf.Tensor | None = None,
    recompute: bool = False,
) -> tf.Tensor:
    """Runs tokens through their experts by a plan of static slots.

    Args:
        network: As for `run_experts`.
        inputs: `(N, D)`, the tokens.
        plan: From `make_slot_plan`.
        weights: Tensors `(E, ...)`.
        gates: `(N, K)` float or None. With them the answers of a token's experts are
            summed, weighted by them. Defaults to `None`.
        recompute: As for `run_experts`.

    Returns:
        `(N, K, out)`, the answer to each assignment, zero where it has no expert; with
        `gates` `(N, out)`. The same in every run, but for sums over more than 16
        experts.

    Raises:
        ValueError: Shapes do not fit.

    Reference:
        Shazeer et al. 2017, equation 1.
    """
    is_summed = gates is not None
    # The backward pass may be traced elsewhere, and is compiled if this is.
    is_compiled = ops.is_compiled_by_xla()
    slots, spill = _Slots(plan, is_summed, is_compiled), _Spill(plan, is_compiled)
    if gates is None:
        gates = tf.ones(tf.shape(plan.positions), float_type(inputs, weights))

    @tf.custom_gradient
    def run(x, gates, *weights):
        flat_gates = tf.reshape(gates, [-1, 1])
        rows = slots.filled_from(x)
        with tf.GradientTape(persistent=True) as tape:
            watch(tape, rows, weights)
            of_slots = recomputed(network) if recompute else network
            answers = of_slots(rows, *weights)

        def add_block(b, total):
            owner, which, valid = spill.block(b)
            own = [_of(owner, weight) for weight in weights]
            y = network(tf.gather(x, slots.token(which))[tf.newaxis], *own)[0]
            y = _where(valid[:, tf.newaxis], y * tf.gather(flat_gates, which))
            return (slots.add_rows(total, slots.target(which), y),)

        total = slots.combined(answers, gates, flat_gates)
        outputs = spill.loop(add_block, [total])[0]

        def grad(dy):
            d_gates = tf.reshape(slots.gradient_of_gates(answers, dy), [-1])
            upstream = tf.gather(dy, slots.targets)  # (E, C, out)
            upstream = slots.only_filled(upstream * slots.gates_of(flat_gates))
            d_rows, *d_weights = gradients_on(tape, answers, rows, weights, upstream)
            # The loop adds to the gradients that there are.
            trained = [i for i, d in enumerate(d_weights) if d is not None]
            state = slots.per_token(d_rows), d_gates, *(d_weights[i] for i in trained)
            d_x, d_gates, *totals = spill.loop(
                lambda b, *state: add_gradients(dy, trained, b, *state), state
            )
            for i, total in zip(trained, totals, strict=True):
                d_weights[i] = total
            return d_x, tf.reshape(d_gates, tf.shape(gates)), *d_weights

        def add_gradients(dy, trained, b, d_x, d_gates, *d_weights):
            owner, which, valid = spill.block(b)
            tokens = slots.token(which)
            own = [tf.gather(x, tokens)[tf.newaxis]]
            own += [_of(owner, weight) for weight in weights]
            sources = [own[0], *(own[1 + i] for i in trained)]
            with tf.GradientTape() as tape:
                tape.watch(sources)
                y = network(*own)
            upstream = tf.gather(dy, slots.target(which))
            upstream = _where(valid[:, tf.newaxis], upstream)
            d_of_gates = tf.reduce_sum(upstream * y[0], axis=-1)
            d_own = tape.gradient(
                y,
                sources,
                (upstream * tf.gather(flat_gates, which))[tf.newaxis],
                unconnected_gradients="zero",
            )
            return (
                slots.add_rows(d_x, tokens, d_own[0][0]),
                slots.add_rows(d_gates, which, d_of_gates),
                *(
                    slots.add_rows(total, owner[tf.newaxis], part)
                    for total, part in zip(d_weights, d_own[1:], strict=True)
                ),
            )

        return outputs, grad

    outputs = run(inputs, tf.cast(gates, float_type(inputs, weights)), *weights)
    if is_summed:
        return outputs
    shape = tf.concat([tf.shape(plan.positions), [outputs.shape[-1]]], axis=0)
    return tf.ensure_shape(
        tf.reshape(outputs, shape), [*plan.expert_indices.shape, outputs.shape[-1]]
    )


class _Slots:
    """Moves rows between tokens and the slots of the experts.

    Attributes:
        targets: `(E, C)` int64. The row of the result each slot belongs to: its token,
            or its assignment where answers are not summed.
    """

    def __init__(self, plan, is_summed, is_compiled):
        self._plan, self._is_summed = plan, is_summed
        self._is_compiled = is_compiled
        self._shape = tf.shape(plan.positions)
        self._k = tf.cast(self._shape[1], tf.int64)
        k = plan.expert_indices.shape[1]
        self._has_few = k is not None and k <= MOST_GATHERED
        self._filled = (plan.assignments >= 0)[..., tf.newaxis]
        self._assignments = tf.maximum(plan.assignments, 0)
        self.targets = self.target(self._assignments)

    def token(self, assignments):
        return assignments // self._k

    def target(self, assignments):
        return self.token(assignments) if self._is_summed else assignments

    def only_filled(self, values):
        return _where(self._filled, values)

    def filled_from(self, tokens):
        """`(N, D)` -> `(E, C, D)`, zeros in empty slots."""
        return self.only_filled(tf.gather(tokens, self._plan.token_indices))

    def gates_of(self, flat_gates):
        """`(N * K, 1)` -> `(E, C, 1)`."""
        return tf.gather(flat_gates, self._assignments)

    def at_assignments(self, values):
        """`(E, C, ...)` -> `(N, K, ...)`, zeros where an assignment has no slot."""
        chosen, has_slot = self._chosen(values)
        return _where(
            has_slot if values.shape.rank == 2 else has_slot[..., tf.newaxis], chosen
        )

    def _chosen(self, values):
        """The same with anything in place of the zeros, and where there is a slot."""
        rest = values.shape[2:]
        has_slot = self._plan.positions >= 0
        if self._plan.assignments.shape[1] == 0:
            return tf.zeros([*tf.unstack(self._shape), *rest], values.dtype), has_slot
        values = tf.reshape(values, [-1, *rest])
        return tf.gather(values, tf.maximum(self._plan.positions, 0)), has_slot

    def combined(self, answers, gates, flat_gates):
        """The result as far as it comes from slots."""
        if self._has_few or not self._is_summed:
            chosen = self.at_assignments(answers) * gates[..., tf.newaxis]
            if self._is_summed:
                return tf.reduce_sum(chosen, axis=1)
            return tf.reshape(chosen, [-1, answers.shape[-1]])
        return self._scattered(answers * self.gates_of(flat_gates))

    def gradient_of_gates(self, answers, dy):
        """`(N, K)`, the products of answers with the gradients of their rows."""
        if not self._is_summed:  # the gates are ones, whose gradient nobody wants
            return tf.zeros(self._shape, answers.dtype)
        if self._has_few:
            # By token, since XLA then writes no product of all answers.
            chosen, has_slot = self._chosen(answers)
            of_each = tf.matmul(chosen, dy[..., tf.newaxis])
            return _where(has_slot, tf.squeeze(of_each, axis=-1))
        products = tf.gather(dy, self.targets) * answers
        return self.at_assignments(tf.reduce_sum(products, axis=-1))

    def per_token(self, values):
        """`(E, C, D)` -> `(N, D)`, the sum over a token's slots."""
        if self._has_few:
            return tf.reduce_sum(self.at_assignments(values), axis=1)
        return self._scattered(values)

    def _scattered(self, values):
        total = tf.zeros([self._shape[0], values.shape[-1]], values.dtype)
        return self.add_rows(total, self._plan.token_indices, self.only_filled(values))

    def add_rows(self, total, indices, rows):
        """`total` with rows added at indices."""
        indices = indices[..., tf.newaxis]
        if self._is_compiled:
            return tf.tensor_scatter_nd_add(total, indices, rows)
        # The same, with kernels of half precision for GPUs.
        return ops.add_at(total, indices, rows)


class _Spill:
    """The blocks of rows beyond the slots of their expert."""

    def __init__(self, plan, is_compiled):
        self._plan, self._is_compiled = plan, is_compiled
        # None of an empty batch.
        self._rows = tf.cast(tf.maximum(tf.size(plan.spill_rows), 1), tf.int64)
        self._capacity = tf.cast(tf.shape(plan.assignments)[1], tf.int64)
        beyond = tf.maximum(plan.counts - self._capacity, 0)
        self._blocks = -(-beyond // self._rows)  # (E,)
        self._ends = tf.cumsum(self._blocks)

    def block(self, b):
        """Owner `()`, assignments `(S,)`, and which of these there are."""
        b = tf.cast(b, tf.int64)
        owner = tf.reduce_sum(tf.cast(self._ends <= b, tf.int64))
        first = b - tf.gather(self._ends - self._blocks, owner)
        rank = self._capacity + first * self._rows + self._plan.spill_rows
        valid = rank < tf.gather(self._plan.counts, owner)
        return owner, self._plan.sorted_at(owner, rank, valid), valid

    def loop(self, body, state):
        """Runs `body(b, *state)` for every block b."""
        # The one number that the host has to know.
        number = tf.cast(self._ends[-1], tf.int32)
        return tf.while_loop(
            lambda b, *_: b < number,
            lambda b, *state: (b + 1, *body(b, *state)),
            (tf.constant(0), *state),
            maximum_iterations=self._most() if self._is_compiled else None,
        )[1:]

    def _most(self):
        """A bound by shapes alone: without one XLA cannot compile a gradient.

        Elsewhere the GPU would be asked at every turn whether it is reached.
        """
        plan = self._plan
        of_blocks = tf.size(plan.positions) // tf.maximum(tf.size(plan.spill_rows), 1)
        return of_blocks + plan.counts.shape[0]


def _where(condition, values):
    return tf.where(condition, values, tf.zeros([], values.dtype))


def _of(owner, weight):
    """`(E, ...)` -> `(1, ...)`, that of one expert."""
    if weight.dtype == tf.int8 and not ops.is_compiled_by_xla():
        # A GPU gathers no int8; it slices them where the host says.
        rest = weight.shape.rank - 1
        begin = tf.pad(tf.cast(owner, tf.int32)[tf.newaxis], [[0, rest]])
        return tf.slice(weight, begin, [1, *weight.shape[1:]])
    return tf.gather(weight, owner[tf.newaxis])
