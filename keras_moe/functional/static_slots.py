"""Experts in slots of a static number, and nothing dropped: for XLA and GPUs.

Every expert has the same `capacity` slots, a number that follows from shapes alone, and
all of them are computed in one batched product. What an expert gets beyond that spills:
a loop runs blocks of `spill` rows of one expert each. How often it turns is data, zero
where routing is balanced. So no shape depends on the data, XLA compiles a mixture, no
size has to leave the GPU, and the worst batch costs time instead of tokens. The graph
does not grow with the number of experts.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_moe import checks, runtime
from keras_moe.functional import ops
from keras_moe.functional.capacity import CapacityDispatcher
from keras_moe.functional.dispatching import (
    Dispatcher,
    Mixed,
    make_dispatch_plan,
    without_padding,
)
from keras_moe.functional.sorting import long_range, sort_by_expert, take
from keras_moe.functional.static_rows import gather_rows, sum_rows
from keras_moe.types import DispatchPlan

# Slots of all experts over assignments of all tokens.
CAPACITY_FACTOR = 1.25


class _SlotFields(NamedTuple):
    token_indices: tf.Tensor
    counts: tf.Tensor
    positions: tf.Tensor
    expert_indices: tf.Tensor
    assignments: tf.Tensor
    order: tf.Tensor
    starts: tf.Tensor
    spill_rows: tf.Tensor


class SlotPlan(_SlotFields, DispatchPlan):
    """Static slots for every expert, and a loop for what exceeds them.

    `mix_experts` follows it, as `layers.Experts` do; there is no tensor that holds the
    rows of all assignments, so it has neither `dispatch` nor `combine`.

    Attributes:
        token_indices: `(E, C)` int64. The token in every slot, 0 in empty ones.
        counts: `(E,)` int64. Rows of each expert, beyond its slots too.
        positions: `(N, K)` int64. The slot of each assignment, counted over all
            experts; -1 for one that has spilled, or has no expert.
        expert_indices: `(N, K)` int32. The expert of each assignment, -1 for none.
        assignments: `(E, C)` int64. The assignment in every slot, as an index into
            `expert_indices`, flattened; -1 in empty ones.
        order: `(N * K,)` int64. Assignments sorted by expert, those without one last.
        starts: `(E,)` int64. Where those of each expert start in `order`.
        spill_rows: `(S,)` int64, 0 to S - 1: the rows of a block of what exceeds the
            slots.
    """

    __slots__ = ()

    @property
    def overflow(self) -> tf.Tensor:
        """`()` int32, always 0."""
        return tf.constant(0, tf.int32)

    def sorted_at(
        self, experts: tf.Tensor, ranks: tf.Tensor, valid: tf.Tensor
    ) -> tf.Tensor:
        """The assignments at some ranks among those of an expert, 0 if not valid."""
        rows = tf.gather(self.starts, experts) + ranks
        return take(self.order, rows, valid)

    def dispatch(self, inputs):
        raise ValueError(
            "A plan of static slots has no `dispatch`: rows beyond the slots are run in "
            "a loop. Received: a SlotPlan. Hand it to `mix_experts`, or make a plan "
            "with `make_dispatch_plan`."
        )

    def combine(self, expert_outputs, gates, num_tokens=None):
        raise ValueError(
            "A plan of static slots has no `combine`: rows beyond the slots are run in "
            "a loop. Received: a SlotPlan. Hand it to `mix_experts`, or make a plan "
            "with `make_dispatch_plan`."
        )


class StaticDispatcher(Dispatcher):
    """Static shapes, and nothing dropped: a `SlotPlan` for every call.

    Experts that are not stacked, an `ExpertList` say, cannot be a loop over weights:
    XLA gets a slot for every token from each of them, otherwise they get their rows,
    whose numbers the host asks for once. The shapes of a gate that gives tokens
    different numbers of experts in a form of its own depend on the data; XLA cannot
    compile them.

    Args:
        k: Experts for each token on average, if the gate says: as many slots are made.
            None takes the width of the gates. Defaults to `None`.
    """

    static_shapes = True

    def __init__(self, k: int | None = None):
        self._k = k

    def mix(self, experts, tokens, result, mask=None):
        is_compiled = ops.is_compiled_by_xla()
        if result.is_ragged and is_compiled:
            raise ValueError(
                "`jit_compile` of a mixture must be False if its gate gives tokens "
                "different numbers of experts: shapes then depend on the data. Received: "
                f"gates of shape {result.gates.shape} with `token_indices`, "
                "jit_compile=True. Leave it out, or return (tokens, k) gates and "
                "experts, where expert -1 stands for none."
            )
        result = without_padding(result, mask)
        if hasattr(experts, "stacked_weights") and not result.is_ragged:
            if runtime.compiles_mixtures() and not (
                # Their values are noted for the step around.
                is_compiled
                or tf.executing_eagerly()
                or getattr(experts, "frozen_experts", ())
            ):
                return _mix_compiled(super().mix, experts, tokens, result)
            return super().mix(experts, tokens, result, mask)
        if is_compiled:
            of_each = CapacityDispatcher(result.statistics.counts.shape[0])
            return of_each.mix(experts, tokens, result, mask)
        if result.is_ragged:
            return _only_real(Dispatcher(), experts, tokens, result, mask)
        return Mixed(_mix_rows(experts, tokens, result), tf.constant(0, tf.int32))

    def make_plan(self, result, mask):
        num_experts = result.statistics.counts.shape[0]
        return make_slot_plan(result.expert_indices, num_experts, mask, k=self._k)


def _mix_compiled(mix, experts, tokens, result):
    """The gate has left padding without experts, and stays outside with its state."""

    @tf.function(jit_compile=True, autograph=False)
    def run(tokens, gates, expert_indices):
        own = result._replace(gates=gates, expert_indices=expert_indices)
        return mix(experts, tokens, own).outputs

    outputs = run(tokens, result.gates, result.expert_indices)
    return Mixed(outputs, tf.constant(0, tf.int32))


def _mix_rows(experts, tokens, result):
    """Rows sorted by expert on the GPU, and split where the host says.

    Their number is static, and what has no expert, padding say, is at their end.
    """
    indices = tf.cast(result.expert_indices, tf.int64)
    order, ranks, counts, starts = sort_by_expert(
        indices, result.statistics.counts.shape[0]
    )
    nothing = tf.constant(-1, tf.int64)
    rows = tf.gather(starts, tf.maximum(indices, 0)) + ranks
    positions = tf.where(indices >= 0, rows, nothing)
    k = tf.shape(indices, tf.int64)[1]
    is_real = long_range(tf.size(order)) < tf.reduce_sum(counts)
    token_indices = tf.where(is_real, order // k, nothing)
    rows = gather_rows(tokens, token_indices, positions)
    with tf.device("CPU:0"):  # all that waits for it, at once
        counts = tf.identity(tf.cast(counts, tf.int32))
    num_real = tf.reduce_sum(counts)
    answers = experts(rows[:num_real], counts=counts)
    answers = tf.pad(answers, [[0, tf.shape(rows)[0] - num_real], [0, 0]])
    gates = tf.cast(result.gates, answers.dtype)
    return sum_rows(answers, gates, token_indices, positions)


def _only_real(dispatcher, experts, tokens, result, mask):
    """Dispatch in shapes that depend on the data, where padding is among the tokens."""
    if mask is not None:
        kept = tf.gather(mask, result.token_indices)
        result = result._replace(
            gates=tf.boolean_mask(result.gates, kept),
            expert_indices=tf.boolean_mask(result.expert_indices, kept),
            token_indices=tf.boolean_mask(result.token_indices, kept),
        )
    return dispatcher.mix(experts, tokens, result)


def slot_sizes(
    num_assignments: tf.Tensor | int, num_experts: int
) -> tuple[tf.Tensor | int, tf.Tensor | int]:
    """Slots of each expert and rows of a spill block, by shapes alone.

    1.25 times the mean number of rows of an expert, rounded up to a multiple of 8, and of
    16, 32, 64 or 128 from 512, 1,024, 2,048 or 4,096 slots on: what tensor cores and
    the tiles of matrix products take, and less than 4 % more work there. Where there
    are known to be fewer than a quarter as many rows as experts no expert has slots:
    reading the weights of all would cost more than the loop. A block is half as large
    as the slots of an expert, within 8 and 256 rows. Both are 0 for an empty batch.

    Args:
        num_assignments: M, assignments of tokens to experts. Ints where shapes are
            known, else a scalar int32 tensor.
        num_experts: E.

    Returns:
        Two numbers of the kind of `num_assignments`.
    """
    known = tf.get_static_value(num_assignments)
    if known is not None:
        num_assignments = int(known)
        if 4 * num_assignments < num_experts:
            return 0, 8 * min(num_assignments, 1)

    def rounded(x, unit):
        return -(-x // unit) * unit

    # Mean times the factor, rounded up, in whole numbers.
    quarters = int(4 * CAPACITY_FACTOR)
    slots = -(-quarters * num_assignments // (4 * num_experts))
    unit = 8
    largest, smallest = (max, min) if known is not None else (tf.maximum, tf.minimum)
    for bound in (512, 1024, 2048, 4096):
        unit = unit + unit * smallest(slots // bound, 1)
    slots = largest(rounded(slots, unit), 8)
    block = smallest(largest(rounded(slots // 2, 8), 8), 256)
    # Without tokens there is none that an empty slot could point at.
    any_there = smallest(num_assignments, 1)
    return slots * any_there, block * any_there


def make_slot_plan(
    expert_indices: tf.Tensor,
    num_experts: int,
    mask: tf.Tensor | None = None,
    capacity: tf.Tensor | int | None = None,
    spill: int | None = None,
    k: int | None = None,
) -> SlotPlan:
    """Gives assignments to the slots of their experts, in the order of the tokens.

    Args:
        expert_indices: `(N, K)` int32 within [0, E), or -1 for no expert.
        num_experts: E.
        mask: `(N,)` bool or None. Tokens marked False take no slot and are not
            counted.
        capacity: C, slots of each expert, at least 0, an int or `()` int32. None takes
            `slot_sizes`.
        spill: Rows of a block of what exceeds them, at least 1. None takes
            `slot_sizes`.
        k: Experts for each token on average, of which `slot_sizes` makes slots. None, or
            more than K, takes K.

    Returns:
        A `SlotPlan`. Nothing is dropped, whatever the sizes.

    Raises:
        ValueError: `expert_indices` is not of rank 2; a size is too small.
    """
    if expert_indices.shape.rank != 2:
        raise ValueError(
            "`expert_indices` of a plan of static slots must be (N, K). "
            f"Received: expert_indices.shape={expert_indices.shape}. A gate that gives "
            "tokens different numbers of experts marks the others with -1."
        )
    expert_indices = tf.cast(expert_indices, tf.int32)
    wide = tf.cast(expert_indices, tf.int64)
    if mask is not None:
        wide = tf.where(mask[:, tf.newaxis], wide, tf.constant(-1, tf.int64))
    shape, width = tf.shape(wide), expert_indices.shape[1]
    num_tokens = shape[0] if wide.shape[0] is None else wide.shape[0]
    num_chosen = shape[1] if width is None else width if k is None else min(k, width)
    num_assignments = num_tokens * num_chosen
    slots, block = slot_sizes(num_assignments, num_experts)
    if capacity is not None:
        slots = checks.verify_count(capacity, "capacity", 0)
    if spill is not None:
        block = checks.verify_count(spill, "spill", 1)
    order, ranks, counts, starts = sort_by_expert(wide, num_experts)
    at = long_range(slots)[tf.newaxis, :]
    filled = at < counts[:, tf.newaxis]
    assignments = take(order, starts[:, tf.newaxis] + at, filled)
    wide_slots, nothing = tf.cast(slots, tf.int64), tf.constant(-1, tf.int64)
    positions = tf.where(
        (wide >= 0) & (ranks < wide_slots), wide * wide_slots + ranks, nothing
    )
    return SlotPlan(
        token_indices=assignments // tf.cast(shape[1], tf.int64),
        counts=counts,
        positions=positions,
        expert_indices=expert_indices,
        assignments=tf.where(filled, assignments, nothing),
        order=order,
        starts=starts,
        spill_rows=long_range(block),
    )


def make_plan_here(expert_indices: tf.Tensor, num_experts: int) -> DispatchPlan:
    """The dropless plan for where the code runs, of assignments `(N, K)`."""
    if ops.shapes_are_static():
        return make_slot_plan(expert_indices, num_experts)
    return make_dispatch_plan(expert_indices, num_experts)
