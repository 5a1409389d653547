"""A capacity: the same number of slots for every expert.

All shapes are static, as XLA wants; what does not fit is dropped and counted.
"""

import contextlib
from typing import NamedTuple

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import losses, ops
from keras_moe.functional.dispatching import (
    Dispatcher,
    in_columns,
    inverse_permutation,
    without_padding,
)
from keras_moe.functional.sorting import long_range, sort_by_expert, take
from keras_moe.functional.static_rows import gather_rows, sum_rows
from keras_moe.runtime import only_plain
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
        if ops.shapes_are_static():
            return gather_rows(inputs, self.token_indices, self.positions)
        return _gather_or_zero(inputs, self.token_indices)

    def combine(self, expert_outputs, gates, num_tokens=None):
        gates = tf.cast(gates, expert_outputs.dtype)
        if ops.shapes_are_static():
            return sum_rows(expert_outputs, gates, self.token_indices, self.positions)
        rows = tf.reshape(expert_outputs, [-1, expert_outputs.shape[-1]])
        chosen = _gather_or_zero(rows, self.positions)  # (N, K, D)
        return tf.reduce_sum(chosen * gates[..., tf.newaxis], axis=1)


class CapacityDispatcher(Dispatcher):
    """Gives every expert the same number of slots and drops what does not fit.

    With a mask the real tokens alone say how many slots may be filled; how many there
    are, which shapes depend on, is that of all.

    Args:
        capacity_factor: Float, see `expert_capacity`.
        most_experts: Int or None. The most that a token has, where their number varies:
            columns of a plan. Defaults to `None`.
    """

    static_shapes = True

    def __init__(self, capacity_factor: float, most_experts: int | None = None):
        self.capacity_factor = capacity_factor
        self.most_experts = most_experts

    def mix(self, experts, tokens, result, mask=None):
        if self.most_experts is not None:
            result = in_columns(result, tf.shape(tokens)[0], self.most_experts)
        return super().mix(experts, tokens, without_padding(result, mask), mask)

    def make_plan(self, result, mask):
        verify_fixed_k(
            result, None, f"capacity_factor={self.capacity_factor} with a gate"
        )
        num_experts = result.statistics.counts.shape[0]
        capacity = self._slots(result, tf.shape(result.gates)[0])
        limit = None
        if mask is not None:
            # GPUs count in int64, TensorFlow Lite knows int32.
            whole = tf.int64 if ops.shapes_are_static() else tf.int32
            limit = self._slots(result, tf.reduce_sum(tf.cast(mask, whole)))
        return make_capacity_plan(
            result.expert_indices, num_experts, capacity, mask, limit
        )

    def _slots(self, result, num_tokens):
        num_experts, k = result.statistics.counts.shape[0], result.gates.shape[-1]
        return limit_of(num_tokens, num_experts, k, self.capacity_factor)


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
    return limit_of(num_tokens, num_experts, k, capacity_factor)


def limit_of(num_tokens, num_experts, k, capacity_factor):
    """The same for a checked factor, in the type of `num_tokens`."""
    with _on_host() if num_tokens.dtype == tf.int32 else contextlib.nullcontext():
        slots = rounded_up(num_tokens, capacity_factor * k / num_experts)
        slots = tf.cast(slots, num_tokens.dtype)
    return tf.maximum(tf.minimum(slots, num_tokens), 1)


def rounded_up(num_tokens: tf.Tensor, share: float) -> tf.Tensor:
    """A share of a number of tokens as the next whole number, in floats."""
    if only_plain():
        # In single precision a whole number may come out as slightly more.
        return tf.math.ceil(tf.cast(num_tokens, tf.float32) * (share * (1 - 1e-6)))
    return tf.math.ceil(tf.cast(num_tokens, tf.float64) * share)


def _on_host():
    """Where a size is computed from shapes: floats would go to the GPU and back."""
    on_gpu = ops.shapes_are_static() and not ops.is_compiled_by_xla()
    return tf.device("CPU:0") if on_gpu else contextlib.nullcontext()


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
    limit = capacity if limit is None else limit
    if ops.shapes_are_static():
        return _static_plan(expert_indices, num_experts, capacity, mask, limit)
    num_tokens, k = tf.unstack(tf.shape(expert_indices))
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


def _static_plan(expert_indices, num_experts, capacity, mask, limit):
    """The same by operations of static shapes that GPUs have."""
    wide = tf.cast(expert_indices, tf.int64)
    num_tokens, k = tf.unstack(tf.shape(wide))
    nothing = tf.constant(-1, tf.int64)
    if mask is not None:
        wide = tf.where(mask[:, tf.newaxis], wide, nothing)
    by_choice = tf.reshape(tf.transpose(wide), [-1, 1])  # (N, K) -> (K * N, 1)
    order, ranks, wanted, starts = sort_by_expert(by_choice, num_experts)
    ranks = tf.transpose(tf.reshape(ranks, [k, num_tokens]))
    slots, limit = tf.cast(capacity, tf.int64), tf.cast(limit, tf.int64)
    positions = tf.where((wide >= 0) & (ranks < limit), wide * slots + ranks, nothing)
    counts = tf.minimum(wanted, limit)
    # Without tokens there is none that an empty slot could point at.
    at = long_range(capacity * tf.minimum(num_tokens, 1))[tf.newaxis, :]
    filled = at < counts[:, tf.newaxis]
    tokens = take(order, starts[:, tf.newaxis] + at, filled)
    tokens %= tf.cast(tf.maximum(num_tokens, 1), tf.int64)
    positions.set_shape(expert_indices.shape)
    return CapacityPlan(
        token_indices=tf.cast(tf.where(filled, tokens, nothing), tf.int32),
        counts=tf.cast(counts, tf.int32),
        positions=tf.cast(positions, tf.int32),
        expert_indices=expert_indices,
        overflow=tf.cast(tf.reduce_sum(wanted - counts), tf.int32),
    )


def verify_fixed_k(result: GatingResult, k: int | None, received: str) -> None:
    """Raises unless every token has the same number of experts.

    Args:
        result: What a gate has decided.
        k: How many a token has, on average, if the gate says.
        received: The capacity and the gate, for the message.
    """
    if result.is_ragged or k not in (None, result.gates.shape[1]):
        raise ValueError(
            "`capacity_factor` needs a gate that gives every token the same number of "
            f"experts. Received: {received}, whose tokens have different numbers. "
            "Leave `capacity_factor` out."
        )


def _gather_or_zero(rows, indices):
    """Rows at `indices`, zeros where an index is -1."""
    padded = tf.pad(rows, [[1, 0], [0, 0]])
    return tf.gather(padded, indices + 1)
