"""From chosen experts to rows of work and back.

`make_dispatch_plan` sorts assignments by expert; nothing is dropped.
`make_capacity_plan` has static shapes for XLA; what does not fit is dropped and
counted. `dispatch` and `combine` take either.
"""

from typing import Any

import tensorflow as tf

from keras_moe import checks, placement
from keras_moe.functional import losses
from keras_moe.types import DispatchPlan, GateStatistics, GatingResult


def make_gating_result(
    gates: tf.Tensor,
    expert_indices: tf.Tensor,
    num_experts: int,
    *,
    token_indices: tf.Tensor | None = None,
    load: tf.Tensor | None = None,
    mask: tf.Tensor | None = None,
) -> GatingResult:
    """Wraps chosen experts and their gates into what a gating layer returns.

    Args:
        gates: Float, `(N, K)`, or `(M,)` if tokens have different numbers of
            experts.
        expert_indices: int32 within [0, E), shape of `gates`.
        num_experts: E.
        token_indices: `(M,)` int32, ascending: the token of each assignment.
            Only for gates of shape `(M,)`.
        load: `(E,)` float, a smooth load that carries a gradient. None takes
            the hard counts.
        mask: `(N,)` bool or None. Tokens marked False are left out of the
            statistics.

    Returns:
        A `GatingResult` with a dropless plan over all N tokens.

    Raises:
        ValueError: Shapes do not fit; outside of a graph, an expert is out of range.
    """
    counted = expert_indices
    if mask is not None:
        kept = (
            mask[:, tf.newaxis]
            if token_indices is None
            else tf.gather(mask, token_indices)
        )
        counted = tf.where(kept, expert_indices, -1)
    counts = losses.expert_counts(counted, num_experts)
    statistics = GateStatistics(
        importance=losses.importance(gates, counted, num_experts),
        load=tf.cast(counts, gates.dtype) if load is None else load,
        counts=counts,
    )
    plan = make_dispatch_plan(expert_indices, num_experts, token_indices)
    return GatingResult(gates, plan, statistics)


def make_dispatch_plan(
    expert_indices: tf.Tensor,
    num_experts: int,
    token_indices: tf.Tensor | None = None,
) -> DispatchPlan:
    """Sorts assignments by expert. No capacity, nothing dropped.

    Args:
        expert_indices: int32 within [0, E). `(N, K)` if every token has K
            experts; `(M,)` in token order if their number varies, and then
            `token_indices` is needed.
        num_experts: E.
        token_indices: `(M,)` int32, ascending: the token of each assignment.
            Left out for `(N, K)`.

    Returns:
        A `DispatchPlan`. The sort is stable, so within an expert the tokens
        keep their order.

    Raises:
        ValueError: Shapes do not fit; outside of a graph, an expert is out of range.
    """
    expert_indices = tf.cast(expert_indices, tf.int32)
    rank = expert_indices.shape.rank
    if rank not in (1, 2) or (rank == 1) != (token_indices is not None):
        raise ValueError(
            "`expert_indices` must be (N, K) without `token_indices`, or (M,) with "
            f"it. Received: expert_indices.shape={expert_indices.shape}, "
            f"token_indices={'None' if token_indices is None else 'given'}."
        )
    if placement.for_call().static_shapes:
        # The placement lays out the rows itself, from the chosen experts.
        counts = losses.expert_counts(expert_indices, num_experts)
        nothing: Any = None
        return DispatchPlan(nothing, counts, nothing, expert_indices, tf.constant(0))
    flat_experts = tf.reshape(expert_indices, [-1])
    order = tf.argsort(flat_experts, stable=True)
    if token_indices is None:
        # Assignment a belongs to token a // K.
        sorted_tokens = order // tf.shape(expert_indices)[1]
    else:
        sorted_tokens = tf.gather(tf.cast(token_indices, tf.int32), order)
    positions = tf.reshape(_inverse_permutation(order), tf.shape(expert_indices))
    return DispatchPlan(
        token_indices=sorted_tokens,
        counts=losses.expert_counts(flat_experts, num_experts),
        positions=tf.ensure_shape(positions, expert_indices.shape),
        expert_indices=expert_indices,
        overflow=tf.constant(0, tf.int32),
    )


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
        ValueError: `capacity_factor` is not a positive number, or another number is
            out of range.
    """
    rest = ". With 0 every token would be dropped; use None for no capacity at all."
    checks.verify_number(capacity_factor, "capacity_factor", "(0, inf)", rest)
    k = checks.verify_k(k, num_experts)
    num_tokens = tf.cast(num_tokens, tf.int32)
    slots = tf.math.ceil(
        tf.cast(num_tokens, tf.float64) * (capacity_factor * k / num_experts)
    )
    return tf.maximum(tf.minimum(tf.cast(slots, tf.int32), num_tokens), 1)


def make_capacity_plan(
    expert_indices: tf.Tensor,
    num_experts: int,
    capacity: tf.Tensor | int,
    mask: tf.Tensor | None = None,
) -> DispatchPlan:
    """Gives every expert the same number of slots. All shapes are static.

    Where an expert has more tokens than slots, first choices go before second
    choices and, among equals, earlier tokens before later ones. The rest is
    dropped: its answer is zero and it is counted in `overflow`.

    Args:
        expert_indices: `(N, K)` int32 within [0, E).
        num_experts: E.
        capacity: C, slots of each expert, at least 1.
        mask: `(N,)` bool or None. Tokens marked False take no slot and are not
            counted.

    Returns:
        A `DispatchPlan` with `token_indices` of shape `(E, C)`.

    Raises:
        ValueError: `expert_indices` is not of rank 2, or a number is out of range.
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
    routed = expert_indices
    if mask is not None:
        # An id past the last expert: sorted to the end, and in no count.
        routed = tf.where(mask[:, tf.newaxis], routed, num_experts)
    by_choice = tf.reshape(tf.transpose(routed), [-1])  # (N, K) -> (K * N,)
    order = tf.argsort(by_choice, stable=True)
    wanted = losses.expert_counts(
        tf.where(by_choice < num_experts, by_choice, -1), num_experts
    )
    starts = tf.concat([tf.cumsum(wanted, exclusive=True), [tf.reduce_sum(wanted)]], 0)
    # Rank of each assignment among those of its expert.
    ranks = _inverse_permutation(order) - tf.gather(starts, by_choice)
    kept = (by_choice < num_experts) & (ranks < capacity)
    positions = tf.where(kept, by_choice * capacity + ranks, -1)
    # Slot s of expert e holds assignment starts[e] + s of the sorted order.
    slots = tf.range(capacity)[tf.newaxis, :]
    filled = slots < wanted[:, tf.newaxis]
    source = tf.where(filled, starts[:-1, tf.newaxis] + slots, 0)
    padded_order = tf.concat([order, [0]], axis=0)  # an empty batch has no row 0
    tokens = tf.gather(padded_order, source) % tf.maximum(num_tokens, 1)
    counts = tf.minimum(wanted, capacity)
    return DispatchPlan(
        token_indices=tf.where(filled, tokens, -1),
        counts=counts,
        positions=tf.ensure_shape(
            tf.transpose(tf.reshape(positions, [k, num_tokens])), expert_indices.shape
        ),
        expert_indices=expert_indices,
        overflow=tf.reduce_sum(wanted) - tf.reduce_sum(counts),
    )


def dispatch(inputs: tf.Tensor, plan: DispatchPlan) -> tf.Tensor:
    """Copies every token to the rows of its experts.

    Args:
        inputs: `(N, D)`.
        plan: From `make_dispatch_plan` or `make_capacity_plan`.

    Returns:
        `expert_inputs`: `(M, D)` sorted by expert for a dropless plan,
        `(E, C, D)` with zeros in empty slots for a capacity plan.
    """
    if plan.token_indices.shape.rank == 1:
        return _gather_to_experts(inputs, plan)
    return _gather_or_zero(inputs, plan.token_indices)


def gates_of_rows(gates: tf.Tensor, plan: DispatchPlan) -> tf.Tensor:
    """The gate of every row, in the order of the rows.

    Args:
        gates: Float, shape of `plan.positions`.
        plan: A dropless plan.

    Returns:
        `(M,)`, the gate of the assignment in each row of `dispatch(inputs, plan)`.

    Raises:
        ValueError: The plan has a capacity: rows may be empty.
    """
    if plan.token_indices.shape.rank != 1:
        raise ValueError(
            "`plan` must be dropless. Received: a plan with a capacity, "
            f"token_indices.shape={plan.token_indices.shape}."
        )
    return tf.gather(tf.reshape(gates, [-1]), assignments_of_rows(plan))


def assignments_of_rows(plan: DispatchPlan) -> tf.Tensor:
    """The assignment in every row of a dropless plan.

    Args:
        plan: A dropless plan.

    Returns:
        `(M,)` int32: index into `plan.positions`, flattened.
    """
    return _inverse_permutation(tf.reshape(plan.positions, [-1]))


def combine(
    expert_outputs: tf.Tensor,
    gates: tf.Tensor,
    plan: DispatchPlan,
    num_tokens: tf.Tensor | int | None = None,
) -> tf.Tensor:
    """Sums the answers of each token's experts, weighted by its gates.

    $y = \\sum_i G(x)_i E_i(x)$

    Rows are gathered and summed in a fixed order, so the result is the same in
    every run; no scatter with repeated indices is involved.

    Args:
        expert_outputs: `(M, D)` or `(E, C, D)`, as the plan says.
        gates: Float, shape of `plan.positions`.
        plan: The plan the inputs were dispatched by.
        num_tokens: N; needed only where the number of experts of a token
            varies (`plan.positions` of rank 1).

    Returns:
        `(N, D)`, dtype of `expert_outputs`. Zero for a token without expert.

    Raises:
        ValueError: `num_tokens` is needed and missing.

    Reference:
        Shazeer et al. 2017, equation 1.
    """
    rows = [*plan.token_indices.shape, None]
    checks.verify_shape(rows, "the rows of the plan", expert_outputs=expert_outputs)
    gates = tf.cast(gates, expert_outputs.dtype)
    if plan.token_indices.shape.rank == 2:
        width = expert_outputs.shape[-1]
        rows = _gather_or_zero(
            tf.reshape(expert_outputs, [-1, width]), plan.positions
        )  # (N, K, D)
        return tf.reduce_sum(rows * gates[..., tf.newaxis], axis=1)
    if plan.positions.shape.rank == 2:
        return _combine_fixed_k(expert_outputs, gates, plan)
    if num_tokens is None:
        raise ValueError(
            "`num_tokens` is needed to combine a plan in which tokens have "
            "different numbers of experts. Received: num_tokens=None."
        )
    rows = tf.gather(expert_outputs, plan.positions) * gates[:, tf.newaxis]
    tokens = tf.gather(plan.token_indices, plan.positions)  # ascending
    summed = tf.math.segment_sum(rows, tokens)
    missing = tf.cast(num_tokens, tf.int32) - tf.shape(summed)[0]
    return tf.pad(summed, [[0, missing], [0, 0]])


def verify_gating_result(result):
    """Returns what a gate has returned, or raises unless it is a `GatingResult`."""
    if not isinstance(result, GatingResult):
        raise ValueError(
            "`gating` must return a keras_moe.types.GatingResult. Received: "
            f"{type(result).__name__}. Make one with "
            "`keras_moe.functional.make_gating_result`."
        )
    return result


def _gather_to_experts(inputs, plan):
    """Gather whose gradient gathers too, where each token has K rows."""
    if plan.positions.shape.rank != 2:
        return tf.gather(inputs, plan.token_indices)

    @tf.custom_gradient
    def gather(x):
        def grad(dy):
            # (M, D) -> (N, K, D) -> (N, D): each token's K rows, summed.
            return tf.reduce_sum(tf.gather(dy, plan.positions), axis=1)

        return tf.gather(x, plan.token_indices), grad

    return gather(inputs)


def _combine_fixed_k(expert_outputs, gates, plan):
    @tf.custom_gradient
    def weighted_sum(rows_MD, gates_NK):
        def grad(dy):
            # Each row of the experts has exactly one reader, so the gradient
            # is a gather: no scatter, no atomics.
            gates_M = gates_of_rows(gates_NK, plan)
            dy_MD = tf.gather(dy, plan.token_indices)
            d_gates_M = tf.reduce_sum(dy_MD * rows_MD, axis=1)
            d_gates = tf.gather(d_gates_M, plan.positions)
            return dy_MD * gates_M[:, tf.newaxis], d_gates

        chosen = tf.gather(rows_MD, plan.positions)  # (N, K, D)
        return tf.reduce_sum(chosen * gates_NK[..., tf.newaxis], axis=1), grad

    return weighted_sum(expert_outputs, gates)


def _gather_or_zero(rows, indices):
    """Rows at `indices`, zeros where an index is -1."""
    padded = tf.pad(rows, [[1, 0], [0, 0]])
    return tf.gather(padded, indices + 1)


def _inverse_permutation(permutation):
    # Indices are unique, so the scatter is deterministic.
    return tf.scatter_nd(
        permutation[:, tf.newaxis],
        tf.range(tf.size(permutation)),
        tf.shape(permutation),
    )
