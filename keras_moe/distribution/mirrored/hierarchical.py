"""A hierarchical mixture whose groups live on different devices."""

from typing import Any

import tensorflow as tf

from keras_moe import functional
from keras_moe.distribution.mirrored.dispatcher import MirroredDispatcher
from keras_moe.distribution.topology import make_shards
from keras_moe.types import GateStatistics


def mix_at_groups(
    engine: Any, layer: Any, tokens: tf.Tensor, training: bool | None
) -> tuple[tf.Tensor, GateStatistics, tuple]:
    """Runs each secondary mixture where its group lives (section 3.1).

    The primary gate runs where the token is. A row travels once for each of its
    groups, with its primary gate; the secondary gate, the experts and the sum over
    them run at the group, and one row comes back.

    Args:
        engine: The `MirroredEngine`.
        layer: A built `HierarchicalMoE`.
        tokens: `(N, D)`, those of this replica; no padding among them.
        training: Whether the gates add their noise.

    Returns:
        outputs: `(N, output_units)`.
        statistics: `GateStatistics` whose sum over the replicas is that of the
            global batch: a replica knows its own experts, the rest is zero.
        losses: Those of the primary gate.
    """
    gating = layer.gating
    primary = gating.primary_gating(tokens, training=training)
    plan = functional.make_plan(primary)
    rows = tokens
    if hasattr(layer.experts, "with_keys"):
        rows = layer.experts.with_keys(tokens, None, training)
    rows = plan.dispatch(rows)
    gates = plan.gates_of_rows(primary.gates)
    # The gate travels in two columns: in half precision one would round it.
    coarse = tf.cast(gates, rows.dtype)
    fine = tf.cast(gates - tf.cast(coarse, gates.dtype), rows.dtype)
    rows = tf.concat([rows, coarse[:, tf.newaxis], fine[:, tf.newaxis]], axis=1)
    seen = {}

    def secondary(rows, counts, first_row):
        rows, coarse, fine = tf.split(rows, [rows.shape[1] - 2, 1, 1], axis=1)
        gates = tf.cast(coarse, primary.gates.dtype) + tf.cast(
            fine, primary.gates.dtype
        )
        outputs, seen["importance"], seen["load"], seen["counts"] = _mix_here(
            layer, rows, tokens.shape[1], gates[:, 0], first_row, counts, training
        )
        return outputs

    dispatcher = MirroredDispatcher(engine)
    answers = dispatcher.at_experts(gating, rows, plan.counts, secondary)
    outputs = plan.combine(answers, tf.ones_like(primary.gates), tf.shape(tokens)[0])
    statistics = _spread(layer, engine.replicas, primary.statistics, **seen)
    return outputs, statistics, primary.auxiliary_losses


def _mix_here(layer, rows, features, gates, first_row, counts, training):
    """Answers `(M, output_units)` and the statistics of the groups that live here."""
    gating = layer.gating
    size = layer.num_experts // layer.num_groups
    num_groups = gating.gate_kernel.shape[0]  # of those here; may be 0
    num_experts = num_groups * size
    groups = tf.repeat(tf.range(num_groups), counts)
    secondary_gates, indices, load = gating.secondary(
        tf.cast(rows[:, :features], gating.compute_dtype),
        groups,
        counts,
        training,
        first_row=first_row,
    )
    gates, expert_indices = functional.hierarchical_gates(
        gates, groups, secondary_gates, indices, size
    )
    # A replica without groups sees no rows. It runs the same operations, so that
    # its exchanges come in the order of the others'.
    result = functional.make_gating_result(gates, expert_indices, max(num_experts, 1))
    plan = functional.make_plan(result)
    outputs = layer.experts(plan.dispatch(rows), counts=plan.counts[:num_experts])
    outputs = plan.combine(outputs, gates)
    importance = result.statistics.importance[:num_experts]
    counts = result.statistics.counts[:num_experts]
    if load is None:
        load = tf.cast(counts, importance.dtype)
    return outputs, importance, load, counts


def _spread(layer, replicas, primary, importance, load, counts):
    """Statistics over all experts, zero but for those that live here."""
    own = make_shards(layer.num_groups, replicas.number).experts_of(replicas.index)
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
