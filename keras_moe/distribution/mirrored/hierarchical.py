"""A hierarchical mixture whose groups live on different devices."""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe import functional
from keras_moe.distribution.mirrored.capacity import (
    Capacity,
    fitting,
    ranks_within_choices,
)
from keras_moe.distribution.mirrored.dispatcher import MirroredDispatcher
from keras_moe.distribution.mirrored.expert_variable import HOLDERS
from keras_moe.distribution.topology import Shards
from keras_moe.functional.capacity import limit_of, verify_fixed_k
from keras_moe.functional.hierarchical import choices_of_levels
from keras_moe.types import GateStatistics


def mix_at_groups(
    engine: Any,
    layer: Any,
    tokens: tf.Tensor,
    gate_tokens: tf.Tensor,
    training: bool | None,
    capacity: Capacity | None = None,
) -> tuple[tf.Tensor, tf.Tensor, GateStatistics, tuple, tuple]:
    """Runs each secondary mixture where its group lives (section 3.1).

    The primary gate runs where the token is. A row travels once for each of its
    groups, with its primary gate; the secondary gate, the experts and the sum over
    them run at the group, and one row comes back.

    Args:
        engine: The `MirroredEngine`.
        layer: A built `HierarchicalMoE`.
        tokens: `(N, D)`, those of this replica; no padding among them.
        gate_tokens: `(N, gate_features)`, what the gates see; usually the tokens.
        training: Whether the gates add their noise.
        capacity: That of every expert, or None, which drops nothing. Defaults to
            `None`.

    Returns:
        outputs: `(N, output_units)`.
        overflow: `()` int32, assignments to the experts that are here that are
            dropped.
        statistics: `GateStatistics` whose sum over the replicas is that of the
            global batch: a replica knows its own experts, the rest is zero.
        losses: Those of both levels.
        choices_kept: That of the tokens and of the groups that are here.
    """
    gating, dispatcher = layer.gating, MirroredDispatcher(engine)
    shards = dispatcher.shards_of(gating)
    primary = gating.primary_gating(gate_tokens, training=training)
    plan = functional.make_plan(primary)
    sent = tokens
    if hasattr(layer.experts, "with_keys"):
        sent = layer.experts.with_keys(tokens, None, training)
    features, width = tokens.shape[1], sent.shape[1]
    # What the gates see travels too, where it is something else.
    seen_apart = gate_tokens is not tokens
    if seen_apart:
        sent = tf.concat([sent, gate_tokens], axis=1)
    rows = plan.dispatch(sent)
    gates = plan.gates_of_rows(primary.gates)
    # The gate travels in two columns: in half precision one would round it.
    coarse = tf.cast(gates, rows.dtype)
    fine = tf.cast(gates - tf.cast(coarse, gates.dtype), rows.dtype)
    columns = [coarse, fine]
    queue = None
    if capacity is not None:
        queue = _queue(
            engine.replicas, layer, primary, capacity, tf.shape(tokens)[0], shards
        )
        # Which choice of its token a row is: first choices go before second ones.
        columns.append(tf.cast(plan.assignments_of_rows() % queue.k[0], rows.dtype))
    rows = tf.concat([rows, tf.stack(columns, axis=1)], axis=1)
    seen = {}

    def secondary(rows, counts, first_rows):
        sizes = [rows.shape[1] - len(columns), 1, 1, len(columns) - 2]
        rows, coarse, fine, choice = tf.split(rows, sizes, axis=1)
        gates = tf.cast(coarse, primary.gates.dtype) + tf.cast(
            fine, primary.gates.dtype
        )
        outputs, seen["overflow"], seen["gates"], *seen["statistics"] = _mix_here(
            dispatcher,
            layer,
            rows[:, :width],
            rows[:, width:] if seen_apart else rows[:, :features],
            gates[:, 0],
            first_rows,
            counts,
            training,
            None if queue is None else queue._replace(choice=choice[:, 0]),
        )
        return outputs

    answers = dispatcher.at_experts(gating, rows, plan.counts, secondary)
    outputs = plan.combine(answers, tf.ones_like(primary.gates), tf.shape(tokens)[0])
    statistics = _spread(
        layer, shards, engine.replicas, primary.statistics, *seen["statistics"]
    )
    own = seen["gates"]
    losses = (*primary.auxiliary_losses, *own.auxiliary_losses)
    kept = choices_of_levels(primary.choices_kept, own.choices_kept)
    return outputs, seen["overflow"], statistics, losses, kept


class _Queue(NamedTuple):
    """What says which rows of a group fit.

    Attributes:
        k: Groups of a token, and experts in each.
        limit: `()` int32. Slots of an expert that may be filled.
        replicas: The `engine.Replicas`.
        shards: `Shards` of the groups.
        choice: `(M,)` float. Which choice of its token each row at the group is.
    """

    k: tuple[int, int]
    limit: tf.Tensor
    replicas: Any
    shards: Shards
    choice: Any = None

    def fits(self, expert_indices, num_experts):
        """Whether assignments `(M, K2)` of rows at their groups fit."""
        own = tf.one_hot(tf.cast(self.choice, tf.int32), self.k[0], dtype=tf.int32)
        # The columns of one device, -1 for what another row of the token holds.
        columns = own[:, :, tf.newaxis] * (expert_indices[:, tf.newaxis, :] + 1) - 1
        width = self.k[0] * self.k[1]
        flat = tf.reshape(columns, [-1, width])
        _, counts = ranks_within_choices(flat, num_experts)
        all_counts, index = counts[tf.newaxis], 0
        if self.shards.num_groups > 1:  # other replicas have rows of this group
            all_counts = self.replicas.gather(counts, HOLDERS)
            index = self.shards.group_of(self.replicas.index)
        kept = fitting(flat, all_counts, index, self.limit)
        return tf.reduce_any(tf.reshape(kept, [-1, *self.k]), axis=1)


def _queue(replicas, layer, primary, capacity, num_tokens, shards):
    verify_fixed_k(primary, None, f"capacity_factor={capacity.factor} of {layer.name}")
    k = primary.gates.shape[1], layer.k[1]
    total = tf.reduce_sum(replicas.gather(num_tokens))
    limit = limit_of(total, layer.num_experts, k[0] * k[1], capacity.factor)
    return _Queue(k, limit, replicas, shards)


def _mix_here(
    dispatcher, layer, rows, gate_rows, gates, first_rows, counts, training, queue
):
    """Answers `(M, output_units)`, overflow, gates and statistics of the groups here."""
    gating = layer.gating
    size = layer.num_experts // layer.num_groups
    num_groups = gating.gate_kernel.shape[0]  # of those here; may be 0
    num_experts = num_groups * size
    groups = tf.repeat(tf.range(num_groups), counts)
    secondary = gating.secondary(
        tf.cast(gate_rows, gating.compute_dtype),
        groups,
        counts,
        training,
        first_row=first_rows,
    )
    gates, expert_indices = functional.hierarchical_gates(
        gates, groups, secondary.gates, secondary.indices, size
    )
    # A replica without groups sees no rows. It runs the same operations, so that
    # its exchanges come in the order of the others'.
    result = functional.make_gating_result(gates, expert_indices, max(num_experts, 1))
    sent, overflow = result, tf.constant(0)
    if queue is not None:
        kept = tf.where(queue.fits(expert_indices, max(num_experts, 1)))
        overflow = tf.size(expert_indices) - tf.shape(kept)[0]
        sent = result._replace(
            gates=tf.gather_nd(gates, kept),
            expert_indices=tf.gather_nd(expert_indices, kept),
            token_indices=tf.cast(kept[:, 0], tf.int32),
        )
    plan = functional.make_plan(sent)
    outputs = dispatcher.run_experts(
        layer.experts,
        plan.dispatch(rows),
        plan.counts[:num_experts],
        size,
        dispatcher.shards_of(gating).group_size,
    )
    outputs = plan.combine(outputs, sent.gates, tf.shape(rows)[0])
    importance = result.statistics.importance[:num_experts]
    counts = result.statistics.counts[:num_experts]
    load = secondary.load
    if load is None:
        load = tf.cast(counts, importance.dtype)
    return outputs, overflow, secondary, importance, load, counts


def _spread(layer, shards, replicas, primary, importance, load, counts):
    """Statistics over all experts, zero but for those that live here."""
    own = shards.experts_of(replicas.index)
    size = layer.num_experts // layer.num_groups
    if load.shape.rank == 2:  # smooth, of the secondary gates
        sent = tf.reduce_sum(replicas.gather(primary.counts), axis=0)
        load = functional.hierarchical_load(
            replicas.sum(primary.load)[own.start : own.stop],
            load,
            sent[own.start : own.stop],
        )
    around = [[own.start * size, (layer.num_groups - own.stop) * size]]
    return GateStatistics(*(tf.pad(x, around) for x in (importance, load, counts)))
