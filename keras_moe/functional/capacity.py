"""A capacity: the same number of slots for every expert.

All shapes are static, as XLA wants; what does not fit is dropped and counted, or has its
turn in a further round.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import losses
from keras_moe.functional.dispatching import Dispatcher, Mixed, inverse_permutation
from keras_moe.functional.plain import only_plain
from keras_moe.types import DispatchPlan, GatingResult


class _CapacityFields(NamedTuple):
    token_indices: tf.Tensor
    counts: tf.Tensor
    positions: tf.Tensor
    expert_indices: tf.Tensor
    overflow: tf.Tensor


class CapacityPlan(_CapacityFields, DispatchPlan):
    """The same number of slots for every expert. All shapes are static.

    Attributes:
        token_indices: `(E, C)` int32. The token in every slot, -1 where it is empty.
        counts: `(E,)` int32. Slots of each expert that hold a token.
        positions: `(N, K)` int32. The slot of each assignment, counted over all
            experts, -1 for a dropped one.
        expert_indices: `(N, K)` int32. The expert of each assignment.
        overflow: `()` int32. Assignments dropped for want of capacity.
    """

    __slots__ = ()

    def dispatch(self, inputs):
        return _gather_or_zero(inputs, self.token_indices)

    def combine(self, expert_outputs, gates, num_tokens=None):
        gates = tf.cast(gates, expert_outputs.dtype)
        rows = tf.reshape(expert_outputs, [-1, expert_outputs.shape[-1]])
        chosen = _gather_or_zero(rows, self.positions)  # (N, K, D)
        return tf.reduce_sum(chosen * gates[..., tf.newaxis], axis=1)


class CapacityDispatcher(Dispatcher):
    """Gives every expert the same number of slots and drops what does not fit.

    With a mask the real tokens alone say how many slots may be filled; how many there
    are, which shapes depend on, is that of all.

    Args:
        capacity_factor: Float, see `expert_capacity`.
    """

    static_shapes = True

    def __init__(self, capacity_factor: float):
        self.capacity_factor = capacity_factor

    def mix(self, experts, tokens, result, mask=None):
        return super().mix(experts, tokens, _without_padding(result, mask), mask)

    def make_plan(self, result, mask):
        verify_fixed_k(result, f"capacity_factor={self.capacity_factor} with a gate")
        num_experts = result.statistics.counts.shape[0]
        capacity = self._slots(result, tf.shape(result.expert_indices)[0])
        limit = None
        if mask is not None:
            limit = self._slots(result, tf.reduce_sum(tf.cast(mask, tf.int32)))
        return make_capacity_plan(
            result.expert_indices, num_experts, capacity, mask, limit
        )

    def _slots(self, result, num_tokens):
        num_experts, k = result.statistics.counts.shape[0], result.gates.shape[-1]
        return expert_capacity(num_tokens, num_experts, k, self.capacity_factor)


class RoundsDispatcher(CapacityDispatcher):
    """Static shapes, and nothing dropped: slots are filled again until all had theirs.

    One round at good balance. XLA compiles it. Experts must be a pure function of their
    rows, as `layers.Experts` are.

    Args:
        capacity_factor: Float, see `expert_capacity`: slots of a round.
    """

    def mix(self, experts, tokens, result, mask=None):
        result = _without_padding(result, mask)
        outputs = mix_in_rounds(
            lambda rows, counts: experts(rows, counts=counts),
            tf.cast(tokens, experts.compute_dtype),
            result.gates,
            result.expert_indices,
            result.statistics.counts.shape[0],
            self._slots(result, tf.shape(tokens)[0]),
            experts.compute_output_shape(tokens.shape)[-1],
            mask,
        )
        return Mixed(outputs, tf.constant(0))


def expert_capacity(
    num_tokens: tf.Tensor | int, num_experts: int, k: int, capacity_factor: float
) -> tf.Tensor:
    """Slots of each expert: `ceil(capacity_factor * k * N / E)`.

    Args:
        num_tokens: N, an int or a scalar int32 tensor.
        num_experts: E.
        k: Experts for each token.
        capacity_factor: 1 fits perfect balance exactly; `E / k` can never
            overflow.

    Returns:
        `()` int32, at least 1 and at most `num_tokens` (an expert takes a
        token once at most), and 1 for an empty batch.

    Raises:
        ValueError: `capacity_factor` is not a positive number.
    """
    capacity_factor = checks.verify_capacity_factor(capacity_factor)
    k = checks.verify_k(k, num_experts)
    num_tokens = tf.cast(num_tokens, tf.int32)
    share = capacity_factor * k / num_experts
    if only_plain():
        # In single precision a whole number may come out as slightly more.
        slots = tf.math.ceil(tf.cast(num_tokens, tf.float32) * (share * (1 - 1e-6)))
    else:
        slots = tf.math.ceil(tf.cast(num_tokens, tf.float64) * share)
    return tf.maximum(tf.minimum(tf.cast(slots, tf.int32), num_tokens), 1)


def make_capacity_plan(
    expert_indices: tf.Tensor,
    num_experts: int,
    capacity: tf.Tensor | int,
    mask: tf.Tensor | None = None,
    limit: tf.Tensor | int | None = None,
) -> CapacityPlan:
    """Gives every expert the same number of slots. All shapes are static.

    Where an expert has more tokens than slots, first choices go before second
    choices and, among equals, earlier tokens before later ones. The rest is
    dropped: its answer is zero and it is counted in `overflow`.

    Args:
        expert_indices: `(N, K)` int32 within [0, E), or -1 for no expert.
        num_experts: E.
        capacity: C, slots of each expert, at least 1.
        mask: `(N,)` bool or None. Tokens marked False take no slot and are not
            counted.
        limit: Slots of each expert that may be filled, at most C; None fills all.
            With padding it is the capacity of the real tokens, which only the
            values tell, while C is static. Defaults to `None`.

    Returns:
        A `CapacityPlan`.

    Raises:
        ValueError: `expert_indices` is not of rank 2.
    """
    capacity = tf.cast(checks.verify_count(capacity, "capacity", 1), tf.int32)
    expert_indices = tf.cast(expert_indices, tf.int32)
    if expert_indices.shape.rank != 2:
        raise ValueError(
            "`expert_indices` of a capacity plan must be (N, K). "
            f"Received: expert_indices.shape={expert_indices.shape}. A gate that "
            "gives tokens different numbers of experts needs a dropless plan."
        )
    num_tokens, k = tf.unstack(tf.shape(expert_indices))
    limit = capacity if limit is None else limit
    # An id past the last expert: sorted to the end, and in no count.
    routed = tf.where(expert_indices < 0, num_experts, expert_indices)
    if mask is not None:
        routed = tf.where(mask[:, tf.newaxis], routed, num_experts)
    by_choice = tf.reshape(tf.transpose(routed), [-1])  # (N, K) -> (K * N,)
    order = tf.argsort(by_choice, stable=True)
    wanted = losses.expert_counts(
        tf.where(by_choice < num_experts, by_choice, -1), num_experts
    )
    starts = tf.concat([tf.cumsum(wanted, exclusive=True), [tf.reduce_sum(wanted)]], 0)
    # Rank of each assignment among those of its expert.
    ranks = inverse_permutation(order) - tf.gather(starts, by_choice)
    kept = (by_choice < num_experts) & (ranks < limit)
    positions = tf.where(kept, by_choice * capacity + ranks, -1)
    # Slot s of expert e holds assignment starts[e] + s of the sorted order.
    slots = tf.range(capacity)[tf.newaxis, :]
    counts = tf.minimum(wanted, limit)
    filled = slots < counts[:, tf.newaxis]
    source = tf.where(filled, starts[:-1, tf.newaxis] + slots, 0)
    padded_order = tf.concat([order, [0]], axis=0)  # an empty batch has no row 0
    tokens = tf.gather(padded_order, source) % tf.maximum(num_tokens, 1)
    positions = tf.transpose(tf.reshape(positions, [k, num_tokens]))
    positions.set_shape(expert_indices.shape)
    return CapacityPlan(
        token_indices=tf.where(filled, tokens, -1),
        counts=counts,
        positions=positions,
        expert_indices=expert_indices,
        overflow=tf.reduce_sum(wanted) - tf.reduce_sum(counts),
    )


def mix_in_rounds(
    run: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    gates: tf.Tensor,
    expert_indices: tf.Tensor,
    num_experts: int,
    capacity: tf.Tensor | int,
    width: int,
    mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """A mixture that drops nothing, of static shapes, which XLA compiles.

    Every expert has the same number of slots, and they are filled and run again
    until every token had its turn: one round at good balance, and in memory never
    more than that.

    Args:
        run: Runs the experts: `(E, C, D)` and counts `(E,)` to `(E, C, width)`. A
            pure function, of one float type with the inputs.
        inputs: `(N, D)`, the tokens.
        gates: `(N, K)` float.
        expert_indices: `(N, K)` int32 within [0, E).
        num_experts: E.
        capacity: C, slots of each expert in a round.
        width: Of the answers.
        mask: `(N,)` bool or None. Tokens marked False have no expert.

    Returns:
        `(N, width)`. Zero for a token without expert.
    """
    num_tokens = tf.maximum(tf.shape(expert_indices)[0], 1)
    everywhere = make_capacity_plan(expert_indices, num_experts, num_tokens, mask)
    positions = everywhere.positions
    rounds = tf.where(positions < 0, -1, positions % num_tokens // capacity)

    def body(number, total):
        chosen = tf.where(rounds == number, expert_indices, -1)
        plan = make_capacity_plan(chosen, num_experts, capacity)
        rows = run(plan.dispatch(inputs), plan.counts)
        return number + 1, total + plan.combine(rows, gates)

    last = tf.reduce_max(rounds)
    nothing = tf.zeros([tf.shape(inputs)[0], width], inputs.dtype)
    _, total = tf.while_loop(
        lambda number, _: number <= last,
        body,
        (0, nothing),
        # A bound by shapes alone: without one XLA cannot compile a gradient.
        maximum_iterations=-(-num_tokens // capacity),
    )
    return total


def verify_fixed_k(result: GatingResult, received: str) -> None:
    """Raises unless every token has the same number of experts.

    Args:
        result: What a gate has decided.
        received: The capacity and the gate, for the message.
    """
    if result.is_ragged:
        raise ValueError(
            "`capacity_factor` needs a gate that gives every token the same number of "
            f"experts. Received: {received}, whose tokens have different numbers. "
            "Leave `capacity_factor` out."
        )


def _without_padding(result, mask):
    """The result with gates of 0 for padding: what it holds, NaN too, is not summed."""
    if mask is None or result.is_ragged:
        return result
    gates = tf.where(mask[:, tf.newaxis], result.gates, tf.zeros_like(result.gates))
    return result._replace(gates=gates)


def _gather_or_zero(rows, indices):
    """Rows at `indices`, zeros where an index is -1."""
    padded = tf.pad(rows, [[1, 0], [0, 0]])
    return tf.gather(padded, indices + 1)
