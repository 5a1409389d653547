"""From chosen experts to rows of work and back: plans, and what makes and follows them.

A plan says which token is in which row of the experts and where its answer comes
back. There are four, the first three with `dispatch` and `combine`:

* `SortedPlan`: assignments sorted by expert, K for every token; dropless;
* `RaggedPlan`: the same where tokens have different numbers of experts;
* `CapacityPlan`, in `capacity.py`: the same number of slots for every expert;
* `SlotPlan`, in `static_slots.py`: static shapes, dropless; `mix_experts` follows it.

A `Dispatcher` takes tokens to their experts and brings the answers back, by a plan or,
where experts live on other devices, by an exchange (expert parallelism):
`dispatcher.mix(experts, tokens, result, mask)`.
"""

import inspect
from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import losses
from keras_moe.functional.gating import verify_assignments
from keras_moe.types import DispatchPlan, GatingResult


class _SortedFields(NamedTuple):
    token_indices: tf.Tensor
    counts: tf.Tensor
    positions: tf.Tensor
    expert_indices: tf.Tensor


class _Dropless(_SortedFields, DispatchPlan):
    """What both plans that drop nothing share: rows sorted by expert."""

    __slots__ = ()

    @property
    def overflow(self) -> tf.Tensor:
        """`()` int32, always 0."""
        return tf.constant(0, tf.int32)

    def assignments_of_rows(self) -> tf.Tensor:
        """`(M,)` int32: for every row its index into `positions`, flattened."""
        return inverse_permutation(tf.reshape(self.positions, [-1]))

    def gates_of_rows(self, gates: tf.Tensor) -> tf.Tensor:
        """`(M,)`: the gate of every row, for gates of the shape of `positions`."""
        return tf.gather(tf.reshape(gates, [-1]), self.assignments_of_rows())


class SortedPlan(_Dropless):
    """Assignments sorted by expert, K for every token. Nothing is dropped.

    Attributes:
        token_indices: `(M,)` int32. The token of every row; rows are sorted by
            expert and, within an expert, by token.
        counts: `(E,)` int32. Rows of each expert.
        positions: `(N, K)` int32. The row of each assignment.
        expert_indices: `(N, K)` int32. The expert of each assignment.
    """

    __slots__ = ()

    def dispatch(self, inputs):
        @tf.custom_gradient
        def gather(x):
            def grad(dy):
                # (M, D) -> (N, K, D) -> (N, D): each token's K rows, summed.
                return tf.reduce_sum(tf.gather(dy, self.positions), axis=1)

            return tf.gather(x, self.token_indices), grad

        return gather(inputs)

    def combine(self, expert_outputs, gates, num_tokens=None):
        @tf.custom_gradient
        def weighted_sum(rows_MD, gates_NK):
            def grad(dy):
                # Each row of the experts has exactly one reader, so the gradient
                # is a gather: no scatter, no atomics.
                gates_M = self.gates_of_rows(gates_NK)
                dy_MD = tf.gather(dy, self.token_indices)
                d_gates_M = tf.reduce_sum(dy_MD * rows_MD, axis=1)
                d_gates = tf.gather(d_gates_M, self.positions)
                return dy_MD * gates_M[:, tf.newaxis], d_gates

            chosen = tf.gather(rows_MD, self.positions)  # (N, K, D)
            return tf.reduce_sum(chosen * gates_NK[..., tf.newaxis], axis=1), grad

        return weighted_sum(expert_outputs, tf.cast(gates, expert_outputs.dtype))


class RaggedPlan(_Dropless):
    """Assignments sorted by expert; tokens have different numbers of them.

    Attributes:
        token_indices: `(M,)` int32. The token of every row; rows are sorted by
            expert and, within an expert, by token.
        counts: `(E,)` int32. Rows of each expert.
        positions: `(M,)` int32. The row of each assignment, in token order.
        expert_indices: `(M,)` int32. The expert of each assignment.
    """

    __slots__ = ()

    def dispatch(self, inputs):
        return tf.gather(inputs, self.token_indices)

    def combine(self, expert_outputs, gates, num_tokens=None):
        if num_tokens is None:
            raise ValueError(
                "`num_tokens` is needed to combine a plan in which tokens have "
                "different numbers of experts. Received: num_tokens=None."
            )
        gates = tf.cast(gates, expert_outputs.dtype)
        rows = tf.gather(expert_outputs, self.positions) * gates[:, tf.newaxis]
        tokens = tf.gather(self.token_indices, self.positions)  # ascending
        summed = tf.math.segment_sum(rows, tokens)
        missing = tf.cast(num_tokens, tf.int32) - tf.shape(summed)[0]
        return tf.pad(summed, [[0, missing], [0, 0]])


class Mixed(NamedTuple):
    """What a dispatcher returns.

    Attributes:
        outputs: `(N, output_units)`, the sums of the experts' answers.
        overflow: `()` int32. Assignments dropped for want of capacity.
    """

    outputs: tf.Tensor
    overflow: tf.Tensor


class Dispatcher:
    """Takes tokens to their experts and brings the answers back; dropless here.

    The base of every other dispatcher. One that moves tokens in another way
    overrides `mix`, or `make_plan` alone if a plan says it all.

    Attributes:
        static_shapes: Whether shapes must not depend on the data. Padding then
            stays among the tokens, and `mix` gets the mask.
    """

    static_shapes = False

    def mix(
        self,
        experts: Any,
        tokens: tf.Tensor,
        result: GatingResult,
        mask: tf.Tensor | None = None,
    ) -> Mixed:
        """Runs every token through its experts and sums their answers.

        Args:
            experts: A layer of experts.
            tokens: `(N, D)`.
            result: What the gate has decided.
            mask: `(N,)` bool or None. Tokens marked False have no expert. Only
                where shapes are static; otherwise there is no padding.

        Returns:
            A `Mixed`.
        """
        plan = self.make_plan(result, mask)
        return Mixed(mix_by_plan(experts, tokens, result.gates, plan), plan.overflow)

    def make_plan(self, result: GatingResult, mask: Any) -> DispatchPlan:
        """The plan by which `mix` moves the tokens."""
        return make_plan(result)


def without_padding(result, mask):
    """The result in which padding has no expert.

    Its gates are 0: what it holds, NaN too, is not summed.
    """
    if mask is None or result.is_ragged:
        return result
    is_real, indices = mask[:, tf.newaxis], result.expert_indices
    return result._replace(
        gates=tf.where(is_real, result.gates, tf.zeros_like(result.gates)),
        expert_indices=tf.where(is_real, indices, tf.constant(-1, indices.dtype)),
    )


def in_columns(result, num_tokens, width):
    """A result `(M,)` as `(N, width)`, where expert -1 stands for none."""
    if not result.is_ragged:
        return result
    tokens = result.token_indices  # ascending
    ranks = tf.range(tf.size(tokens)) - tf.searchsorted(tokens, tokens)
    places = tf.stack([tokens, ranks], axis=1)  # unique
    shape = tf.stack([tf.cast(num_tokens, tf.int32), width])
    gates = tf.scatter_nd(places, result.gates, shape)
    experts = tf.scatter_nd(places, result.expert_indices + 1, shape) - 1
    gates, experts = (tf.ensure_shape(x, [None, width]) for x in (gates, experts))
    return result._replace(gates=gates, expert_indices=experts, token_indices=())


def mix_by_plan(
    experts: Any, tokens: tf.Tensor, gates: tf.Tensor, plan: DispatchPlan
) -> tf.Tensor:
    """Runs tokens through their experts by a plan, all on this device.

    Experts whose `call` takes `gates` and `plan` do all of it themselves, as
    `layers.Experts` do; others get their rows, and `counts`.

    Args:
        experts: A layer of experts.
        tokens: `(N, D)`.
        gates: Float, shape of `plan.positions`.
        plan: A `DispatchPlan`.

    Returns:
        `(N, output_units)`.
    """
    if "plan" in inspect.signature(experts.call).parameters:
        return experts(tokens, gates=gates, plan=plan)
    rows = experts(plan.dispatch(tokens), counts=plan.counts)
    return plan.combine(rows, gates, tf.shape(tokens)[0])


def make_plan(result: GatingResult) -> SortedPlan | RaggedPlan:
    """The dropless plan of what a gate has decided.

    Args:
        result: A `GatingResult`.

    Returns:
        A `SortedPlan`, or a `RaggedPlan` if tokens have different numbers of
        experts.
    """
    return make_dispatch_plan(
        result.expert_indices,
        result.statistics.counts.shape[0],
        result.token_indices if result.is_ragged else None,
    )


def make_dispatch_plan(
    expert_indices: tf.Tensor,
    num_experts: int,
    token_indices: tf.Tensor | None = None,
) -> SortedPlan | RaggedPlan:
    """Sorts assignments by expert. No capacity, nothing dropped.

    Args:
        expert_indices: int32 within [0, E). `(N, K)` if every token has K
            experts; `(M,)` in token order if their number varies, and then
            `token_indices` is needed.
        num_experts: E.
        token_indices: `(M,)` int32, ascending: the token of each assignment.
            Left out for `(N, K)`.

    Returns:
        A `SortedPlan`, or a `RaggedPlan` with `token_indices`. The sort is stable,
        so within an expert the tokens keep their order.

    Raises:
        ValueError: Shapes do not fit; outside of a graph, an expert is out of range.
    """
    expert_indices = tf.cast(expert_indices, tf.int32)
    verify_assignments(expert_indices, token_indices)
    flat_experts = tf.reshape(expert_indices, [-1])
    order = tf.argsort(flat_experts, stable=True)
    if token_indices is None:
        # Assignment a belongs to token a // K.
        sorted_tokens = order // tf.shape(expert_indices)[1]
    else:
        sorted_tokens = tf.gather(tf.cast(token_indices, tf.int32), order)
    positions = tf.reshape(inverse_permutation(order), tf.shape(expert_indices))
    positions.set_shape(expert_indices.shape)
    kind = SortedPlan if token_indices is None else RaggedPlan
    return kind(
        token_indices=sorted_tokens,
        counts=losses.expert_counts(flat_experts, num_experts),
        positions=positions,
        expert_indices=expert_indices,
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
    return plan.dispatch(inputs)


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
    if not isinstance(plan, _Dropless):
        raise ValueError(
            "`plan` must be dropless. Received: a plan with a capacity, "
            f"token_indices.shape={plan.token_indices.shape}."
        )
    return plan.gates_of_rows(gates)


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
            varies (a `RaggedPlan`).

    Returns:
        `(N, D)`, dtype of `expert_outputs`. Zero for a token without expert.

    Raises:
        ValueError: `num_tokens` is needed and missing.

    Reference:
        Shazeer et al. 2017, equation 1.
    """
    rows = [*plan.token_indices.shape, None]
    checks.verify_shape(rows, "the rows of the plan", expert_outputs=expert_outputs)
    return plan.combine(expert_outputs, gates, num_tokens)


def inverse_permutation(permutation):
    # Indices are unique, so the scatter is deterministic.
    return tf.scatter_nd(
        permutation[:, tf.newaxis],
        tf.range(tf.size(permutation)),
        tf.shape(permutation),
    )
