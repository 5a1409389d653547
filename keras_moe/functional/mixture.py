"""Dispatch, experts and combine in one, where an expert's rows stay together.

With `dispatch`, `feed_forward_experts` and `combine` one after the other the rows of
all experts lie side by side three times: `(M, D)` before and after the experts, and
`(N, K, D)` in the order of the tokens, and again for the gradients. On a processor
each of these is read from and written to main memory, and takes new pages of it. Here
an expert's rows are gathered for it alone, small enough for the cache, and only their
weighted outputs are put together, in the order of the tokens.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_moe.functional import experts
from keras_moe.functional.blocks import mix_in_blocks
from keras_moe.functional.dispatch import assignments_of_rows, combine, dispatch
from keras_moe.functional.plain import only_plain
from keras_moe.types import DispatchPlan


def mix_feed_forward_experts(
    inputs: tf.Tensor,
    gates: tf.Tensor,
    plan: DispatchPlan,
    kernels: Sequence[tf.Tensor],
    biases: Sequence[tf.Tensor] | None = None,
    activation: experts.Activation = tf.nn.relu,
    recompute: bool = False,
) -> tf.Tensor:
    """Runs every token through its experts and sums their answers.

    $y = \\sum_i G(x)_i E_i(x)$

    The same as `combine(feed_forward_experts(dispatch(...)), ...)`, and computed so
    where the plan has a capacity, tokens have different numbers of experts, or
    `recompute` is set for at most `MOST_UNROLLED_EXPERTS` experts; otherwise with less
    memory traffic.

    Args:
        inputs: `(N, D)`, the tokens.
        gates: Float, shape of `plan.positions`.
        plan: From `make_dispatch_plan` or `make_capacity_plan`.
        kernels: L tensors `(E, in, out)`; the first `in` is D.
        biases: L tensors `(E, out)`, or None for no bias (the paper).
        activation: Function of a tensor, element by element.
        recompute: Whether hidden activations are computed again in the backward
            pass instead of being kept (appendix D).

    Returns:
        `(N, out)`. Zero for a token without expert. The same in every run.

    Reference:
        Shazeer et al. 2017, equation 1.
    """
    num_experts = kernels[0].shape[0]
    dropless = plan.token_indices.shape.rank == 1
    if dropless and plan.positions.shape.rank == 2 and not only_plain():
        gates = tf.cast(gates, kernels[0].dtype)
        if num_experts > experts.MOST_UNROLLED_EXPERTS:
            network = experts.network_of(len(kernels), activation)
            run = experts.recomputed(network) if recompute else network
            weights = [*kernels, *(biases or ())]
            return mix_in_blocks(run, inputs, gates, plan, *weights)
        if not recompute:
            rows = _Rows(plan, num_experts)
            parts = _gather_to_each(inputs, rows)
            parts = experts.run_one_by_one(parts, kernels, biases, activation)
            return _combine_parts(parts, gates, rows)
    expert_inputs = dispatch(inputs, plan)
    expert_outputs = experts.feed_forward_experts(
        expert_inputs, kernels, biases, plan.counts, activation, recompute
    )
    return combine(expert_outputs, gates, plan, tf.shape(inputs)[0])


class _Rows:
    """Which rows belong to which expert, and where they come from."""

    def __init__(self, plan, num_experts):
        self._counts, self._num_experts = plan.counts, num_experts
        self._shape = tf.unstack(tf.shape(plan.positions))  # N and K
        self._order = assignments_of_rows(plan)
        self._assignments = self.split(self._order)
        self.tokens = self.split(plan.token_indices)

    def split(self, values):
        """`(M, ...)` -> one part for each expert."""
        return experts.split_by_expert(values, self._counts, self._num_experts)

    def of_gates(self, gates):
        """`(N, K)` -> for each expert `(rows, 1)`."""
        return self.split(tf.gather(tf.reshape(gates, [-1, 1]), self._order))

    def together(self, parts):
        """`(rows, ...)` of each expert -> `(N, K, ...)`.

        Every assignment has one row, so the order of writing does not matter.
        """
        flat = tf.raw_ops.ParallelDynamicStitch(indices=self._assignments, data=parts)
        return tf.reshape(flat, [*self._shape, *flat.shape[1:]])


def _gather_to_each(inputs, rows):
    @tf.custom_gradient
    def gather(x):
        def grad(*upstream):
            # Each token's K rows, summed.
            return tf.reduce_sum(rows.together(list(upstream)), axis=1)

        return tuple(tf.gather(x, tokens) for tokens in rows.tokens), grad

    return list(gather(inputs))


def _combine_parts(parts, gates, rows):
    @tf.custom_gradient
    def weighted_sum(gates, *parts):
        of_parts = rows.of_gates(gates)

        def grad(dy):
            d_gates, d_parts = [], []
            own = zip(parts, of_parts, rows.tokens, strict=True)
            for part, gates_of_part, tokens in own:
                d_rows = tf.gather(dy, tokens)
                d_gates.append(tf.reduce_sum(d_rows * part, axis=1))
                d_parts.append(d_rows * gates_of_part)
            return rows.together(d_gates), *d_parts

        weighted = [a * b for a, b in zip(parts, of_parts, strict=True)]
        return tf.reduce_sum(rows.together(weighted), axis=1), grad

    return weighted_sum(gates, *parts)
