"""The experts' matrix products: the hot path.

Expert inputs come either as `(M, D)` rows sorted by expert with the number of
rows of each expert (dropless), or as `(E, C, D)` with the same number of slots
for every expert (static shapes). There are six ways to compute them:

* static: one batched product over `(E, C, D)`;
* `"unrolled"`: each expert by itself, no padding; the graph grows with E;
* `"blocks"`: rows are padded into one block for each expert and multiplied in one
  batched product; what exceeds a block spills into further ones. The graph does not
  grow with E, and weight gradients are written once;
* `"chosen"`: the same with copies of the kernels of those experts that have rows. Nothing
  grows with E, and weight gradients are those of the chosen experts (`tf.IndexedSlices`):
  for thousands of experts and few tokens;
* row by row (`few_rows.py`), where the graph is made for far fewer rows than experts, as
  for one token, and nobody has asked for another way;
* slots, under XLA and on GPUs: one batched product over static slots, and a loop for
  what spills (`slot_runs.py`).

With `dispatch`, experts and `combine` one after the other the rows of all experts lie
side by side three times: `(M, D)` before and after the experts, and `(N, K, D)` in the
order of the tokens, and again for the gradients. On a processor each of these is read
from and written to main memory, and takes new pages of it. `mix_experts` gathers an
expert's rows for it alone, small enough for the cache, and only their weighted outputs
are put together, in the order of the tokens.

What one expert computes is a function `network(rows, *weights)`: it maps rows
`(e, R, D)` of e experts and their part of every weight, `(e, ...)`, to `(e, R, out)`.
Within `plain_operations` it gets one expert at a time, without the axis of experts; and also
elsewhere, where experts are unrolled, if it says so by an attribute `takes_one` that is True.
With hundreds of experts each operation that only names an axis counts.
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_moe import checks, runtime
from keras_moe.functional.blocks import chosen_only, mix_in_blocks, run_in_blocks
from keras_moe.functional.dispatching import SortedPlan
from keras_moe.functional.few_rows import are_few, run_row_by_row
from keras_moe.functional.recomputation import (
    Network,
    float_type,
    gradients_of,
    recomputed,
)
from keras_moe.functional.slot_runs import run_in_slots
from keras_moe.functional.static_slots import SlotPlan
from keras_moe.functional.updated_kernels import as_tensors, has_updated, split_each
from keras_moe.types import DispatchPlan

COMPUTATIONS = ("unrolled", "blocks", "chosen")

# Up to so many experts they are unrolled. On CPUs (measured): beyond, the size of the
# graph and stacking the weight gradients cost more than padding does. On other devices
# never: the rows of unrolled experts are put together by an operation that computes in
# the host's memory.
_MOST_UNROLLED = {"CPU": 256}


def default_computation(num_experts: int, device_type: str | None = None) -> str:
    """How the rows of so many experts are computed if nobody says, but for very few rows.

    Args:
        num_experts: E.
        device_type: `"CPU"` or another type of device. None means `"GPU"` if there
            is one, else `"CPU"`. Defaults to `None`.

    Returns:
        `"unrolled"` or `"blocks"`.
    """
    if device_type is None:
        device_type = runtime.device_type()
    most = _MOST_UNROLLED.get(device_type, 0)
    return "unrolled" if num_experts <= most else "blocks"


def verify_computation(computation: str | None) -> str | None:
    """Returns `computation`, or raises unless it is None or a known one."""
    if computation is not None and computation not in COMPUTATIONS:
        raise ValueError(
            f"`computation` must be None or one of {COMPUTATIONS}. Received: "
            f"computation={computation!r}. None chooses by the number of experts."
        )
    return computation


def run_experts(
    network: Network,
    expert_inputs: tf.Tensor,
    weights: Sequence[tf.Tensor],
    counts: tf.Tensor | None = None,
    *,
    recompute: bool = False,
    computation: str | None = None,
) -> tf.Tensor:
    """Runs E networks of one form, each with its own weights on its own rows.

    Args:
        network: Maps rows `(e, R, D)` and the part of every weight that belongs to
            these e experts, `(e, ...)`, to `(e, R, out)`, row by row.
        expert_inputs: `(M, D)` sorted by expert, or `(E, C, D)`.
        weights: Tensors or `tf.Variable`s `(E, ...)`.
        counts: `(E,)` int32, rows of each expert, with sum M. Needed for
            `(M, D)`, not used for `(E, C, D)`.
        recompute: Whether hidden activations are computed again in the backward
            pass instead of being kept (appendix D): same gradients, less
            memory, about a third more operations. Unrolled, the backward pass holds
            those of one expert at a time; otherwise those of all experts of one
            layer.
        computation: `"unrolled"`, each expert by itself; `"blocks"`, one
            batched product; `"chosen"`, one of only those experts that have rows, of
            whose weights copies are made: for far fewer rows than experts. None takes
            `default_computation`, one of the first two, or row by row where M is known
            when a graph is made, at most 16 and at most a sixteenth of E.

    Returns:
        `(M, out)` or `(E, C, out)`. An expert without rows costs nothing.

        With `"chosen"` and `(M, D)` the gradients of `weights` are `tf.IndexedSlices`
        of the experts that have rows, each once; of a `tf.Variable` nothing else is read,
        either.

    Raises:
        ValueError: `counts` is missing for `(M, D)`, or `computation` is unknown.

    Reference:
        Shazeer et al. 2017, section 2 and appendix D.
    """
    if expert_inputs.shape.rank == 2 and counts is None:
        raise ValueError(
            "`counts` is needed for expert inputs of rank 2, to know which rows are "
            f"whose. Received: expert_inputs.shape={expert_inputs.shape}, counts=None."
        )
    verify_computation(computation)
    num_experts = weights[0].shape[0]
    if not _is_of_chosen(computation) or expert_inputs.shape.rank == 3:
        weights = as_tensors(weights)
    if expert_inputs.shape.rank == 3:
        shape = [num_experts, None, None]
        checks.verify_shape(shape, "slots of each expert", expert_inputs=expert_inputs)
        run = recomputed(network) if recompute else network
        return run(expert_inputs, *weights)
    counts = checks.verify_counts(counts, num_experts, expert_inputs)
    if num_experts == 0:  # no experts live on this device: no rows either
        weights = [_no_expert(each) for each in as_tensors(weights)]
        nothing = network(expert_inputs[tf.newaxis], *weights)
        return nothing[0]
    if computation is None and are_few(expert_inputs, num_experts):
        return run_row_by_row(network, expert_inputs, weights, counts)
    if (
        runtime.only_plain()
        or (computation or default_computation(num_experts)) == "unrolled"
    ):
        parts = split_by_expert(expert_inputs, counts, num_experts)
        return _concat(_run_each(network, parts, weights, recompute))
    run = recomputed(network) if recompute else network
    if _is_of_chosen(computation):
        counts, weights = chosen_only(counts, weights)
    return run_in_blocks(run, counts, expert_inputs, *weights)


def mix_experts(
    network: Network,
    inputs: tf.Tensor,
    gates: tf.Tensor,
    plan: DispatchPlan,
    weights: Sequence[tf.Tensor],
    *,
    recompute: bool = False,
    computation: str | None = None,
) -> tf.Tensor:
    """Runs every token through its experts and sums their answers.

    $y = \\sum_i G(x)_i E_i(x)$

    The same as `plan.combine(run_experts(..., plan.dispatch(inputs), ...), gates)`,
    and computed so unless the plan is a `SortedPlan` or a `SlotPlan`; those with less
    memory traffic.

    Args:
        network: As for `run_experts`.
        inputs: `(N, D)`, the tokens.
        gates: Float, shape of `plan.positions`.
        plan: From `make_plan`, `make_capacity_plan` or `make_slot_plan`.
        weights: Tensors or `tf.Variable`s `(E, ...)`.
        recompute: As for `run_experts`.
        computation: As for `run_experts`; `"chosen"` of a `SortedPlan` only.

    Returns:
        `(N, out)`. Zero for a token without expert. The same in every run.

    Raises:
        ValueError: `computation` is unknown.

    Reference:
        Shazeer et al. 2017, equation 1.
    """
    verify_computation(computation)
    num_experts = weights[0].shape[0]
    is_unrolled = (computation or default_computation(num_experts)) == "unrolled"
    is_of_chosen = _is_of_chosen(computation)
    takes_parts = is_of_chosen or (is_unrolled and not recompute)
    if not isinstance(plan, SortedPlan) or not takes_parts:
        weights = as_tensors(weights)
    if isinstance(plan, SlotPlan):
        return run_in_slots(
            network, inputs, plan, weights, gates=gates, recompute=recompute
        )
    by_row = (
        computation is None
        and isinstance(plan, SortedPlan)
        and are_few(plan.token_indices, num_experts)
        and not has_updated(weights)
    )
    if not isinstance(plan, SortedPlan) or runtime.only_plain() or by_row:
        rows = run_experts(
            network,
            plan.dispatch(inputs),
            weights,
            plan.counts,
            recompute=recompute,
            computation=computation,
        )
        return plan.combine(rows, gates, tf.shape(inputs)[0])
    gates = tf.cast(gates, float_type(inputs, weights))
    if not is_unrolled:
        run = recomputed(network) if recompute else network
        counts = plan.counts
        if is_of_chosen:
            counts, weights = chosen_only(counts, weights)
        return mix_in_blocks(run, counts, inputs, gates, plan, *weights)
    rows = _Rows(plan, num_experts)
    parts = _run_each(network, _gather_to_each(inputs, rows), weights, recompute)
    return _combine_parts(parts, gates, rows)


def _is_of_chosen(computation):
    return computation == "chosen" and not runtime.only_plain()


def _no_expert(weight):
    """`(0, ...)` -> `(1, ...)` of zeros, whose gradient goes nowhere."""
    return tf.reduce_sum(weight, axis=0, keepdims=True)


def split_by_expert(x, counts, num_experts):
    """For each expert its rows of `x`, which share its memory."""
    return [x] if num_experts == 1 else tf.split(x, counts, num=num_experts)


def _concat(parts):
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


def _of_each(parts, weights):
    """For each expert its rows and weights, as a batch of one, which shares memory."""
    own = zip(*split_each(weights, len(parts)), strict=True)
    return [
        [tf.expand_dims(part, 0), *mine] for part, mine in zip(parts, own, strict=True)
    ]


def _run_each(network, parts, weights, recompute):
    """Each expert's network on its own rows, one part for each expert."""
    if recompute:
        return _run_each_recomputed(network, parts, weights)
    takes_one = getattr(network, "takes_one", False) and not has_updated(weights)
    if takes_one or runtime.only_plain():
        # Other runtimes take no batched products of any number of rows.
        each = zip(*map(tf.unstack, weights), strict=True)
        return [network(part, *own) for part, own in zip(parts, each, strict=True)]
    return [tf.squeeze(network(*own), axis=0) for own in _of_each(parts, weights)]


def _run_each_recomputed(network, parts, weights):
    """The same; the backward pass holds the activations of one expert."""
    num_experts = len(parts)

    @tf.custom_gradient
    def run(*arguments):
        parts, weights = arguments[:num_experts], arguments[num_experts:]

        def grad(*upstream):
            gradients = []
            dys = [tf.convert_to_tensor(dy) for dy in upstream]  # no slices
            before = dys[:1]
            for own, dy in zip(_of_each(parts, weights), dys, strict=True):
                # An expert waits for the gradients of the one before it.
                with tf.control_dependencies(before):
                    inputs = [tf.identity(each) for each in own]
                found = gradients_of(network, inputs[0], inputs[1:], dy[tf.newaxis])
                before = [each for each in found if each is not None]
                gradients.append(found)
            d_parts, *d_weights = zip(*gradients, strict=True)
            return *(each[0] for each in d_parts), *(
                None if each[0] is None else _concat(list(each)) for each in d_weights
            )

        return tuple(network(*own)[0] for own in _of_each(parts, weights)), grad

    return list(run(*parts, *weights))


class _Rows:
    """Which rows belong to which expert, and where they come from."""

    def __init__(self, plan, num_experts):
        self._counts, self._num_experts = plan.counts, num_experts
        self._shape = tf.unstack(tf.shape(plan.positions))  # N and K
        self._order = plan.assignments_of_rows()
        self._assignments = self.split(self._order)
        self.tokens = self.split(plan.token_indices)

    def split(self, values):
        """`(M, ...)` -> one part for each expert."""
        return split_by_expert(values, self._counts, self._num_experts)

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
