"""Takes rows to the replicas of their experts and brings the answers back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

from keras_moe import functional
from keras_moe.distribution.messages import other_scope
from keras_moe.distribution.mirrored import exchange, expert_layers
from keras_moe.distribution.mirrored.capacity import Capacity, without_dropped
from keras_moe.distribution.mirrored.expert_variable import (
    ExpertVariable,
    among_group,
)
from keras_moe.distribution.topology import Shards, make_shards


class MirroredDispatcher(functional.Dispatcher):
    """Dispatch over the replicas of a strategy; dropless without a capacity.

    Args:
        engine: The `MirroredEngine`.
        capacity: A `Capacity` of the global batch, or None. Defaults to `None`.
    """

    def __init__(self, engine: Any, capacity: Capacity | None = None):
        self._engine, self.capacity = engine, capacity

    def mix(self, experts, tokens, result, mask=None):
        overflow = tf.constant(0)
        if self.capacity is not None:
            result, overflow = without_dropped(
                result, self.capacity, tf.shape(tokens)[0], self._engine.replicas
            )
        plan = self.make_plan(result, mask)
        rows = self.at_experts(
            experts,
            plan.dispatch(tokens),
            plan.counts,
            lambda rows, own_counts, _: self.run_experts(experts, rows, own_counts),
            numbered=False,
        )
        outputs = plan.combine(rows, result.gates, tf.shape(tokens)[0])
        return functional.Mixed(outputs, overflow)

    def at_experts(
        self,
        owner: Any,
        rows: tf.Tensor,
        counts: tf.Tensor,
        function: Callable[[tf.Tensor, tf.Tensor, Any], tf.Tensor],
        numbered: bool = True,
    ) -> tf.Tensor:
        """Runs a function on rows where the weights for them live.

        Args:
            owner: The layer whose stacked weights the function needs.
            rows: `(M, D)` sorted by the first axis of these weights, of length S.
            counts: `(S,)` int32, rows for each entry of that axis.
            function: Takes the rows that arrive, their counts for the entries
                that live here, and `first_rows`; returns a row for each row.
            numbered: Whether the function needs `first_rows`: the number of rows that
                come before these in the sorted rows of all replicas, `()` int32, or
                before those of each entry, `(entries here,)`. Defaults to `True`.

        Returns:
            What the function returns, in the order of `rows`.
        """
        replicas = self._engine.replicas
        shards = self.shards_of(owner)
        if shards is None:  # every replica has all of them
            return function(rows, counts, replicas.num_before(tf.shape(rows)[0]))
        first_rows, among = None, among_group(shards)
        if numbered or among is None:
            all_counts = replicas.gather(counts)
            first_rows = _first_rows(all_counts, shards, replicas.index)
            members = shards.members_of(shards.group_of(replicas.index))
            all_counts = all_counts[members.start : members.stop]
        elif shards.group_size > 1:
            all_counts = replicas.gather(counts, among)
        if shards.group_size == 1:  # rows stay at home
            return function(rows, counts, first_rows)
        position = shards.position_of(replicas.index)
        route = exchange.make_route(all_counts, shards, position)
        move = partial(replicas.exchange, among=among)
        arrived = exchange.to_experts(rows, route, move)
        answers = function(arrived, route.counts, first_rows)
        return exchange.from_experts(answers, route, move)

    def run_experts(
        self,
        experts: Any,
        rows: tf.Tensor,
        counts: tf.Tensor,
        together: int = 1,
        parallel: int | None = None,
    ) -> tf.Tensor:
        """Runs the experts of this replica on rows that have come to them.

        Args:
            experts: The layer of all experts.
            rows: `(M, D)` sorted by expert.
            counts: `(E_own,)` int32, rows of each; `(E,)` where every replica has all.
            together: Experts that live together. Defaults to 1.
            parallel: Replicas of a group that share them out, as their rows have
                travelled. Defaults to `None`, all.

        Returns:
            `(M, output_units)`.
        """
        number = experts.num_experts
        if any(isinstance(v, ExpertVariable) for v in _stacked(experts)):
            return experts(rows, counts=counts)
        # Weights of all experts are everywhere: the layer is called on all, of which
        # the others have no rows.
        replicas = self._engine.replicas
        shards = make_shards(number, replicas.number, together, parallel)
        own = shards.experts_of(replicas.index)
        if counts.shape[0] != number:
            counts = tf.pad(counts, [[own.start, number - own.stop]])
        with expert_layers.rows_of(shards):
            return experts(rows, counts=counts)

    def shards_of(self, experts: Any) -> Shards | None:
        """Where the stacked weights of a layer live; None if all are everywhere.

        Raises:
            ValueError: They were built in the scope of another strategy.
        """
        strategy, number = self._engine.strategy, self._engine.replicas.number
        for variable in experts.weights:
            if isinstance(variable, ExpertVariable):
                if variable.strategy is not strategy:
                    raise other_scope(
                        f"{experts.name!r} of a strategy with "
                        f"{variable.shards.num_replicas} replicas in a step of "
                        f"another with {number}"
                    )
                if _stacked(experts):
                    return variable.shards
                continue
            if not hasattr(variable._value, "_values"):
                raise other_scope(
                    f"{experts.name!r}, built outside of any, in a step on {number} "
                    "replicas"
                )
        if getattr(experts, "experts_are_layers", False):
            return make_shards(experts.num_experts, number)
        return None


def _first_rows(all_counts, shards, replica):
    """How many rows of all replicas come before those of the entries of a replica.

    Args:
        all_counts: `(R, S)` int32.
        shards: `Shards` of the S entries.
        replica: Whose entries.

    Returns:
        `()` int32 where all rows of an entry come to one replica, so that one run
        follows the other; else `(entries of the replica,)`.
    """
    own = shards.experts_of(replica)
    totals = tf.reduce_sum(all_counts, axis=0)
    if shards.num_groups == 1:
        return tf.reduce_sum(totals[: own.start])
    earlier = shards.members_of(shards.group_of(replica)).start
    starts = tf.cumsum(totals, exclusive=True) + tf.reduce_sum(all_counts[:earlier], 0)
    return starts[own.start : own.stop]


def _stacked(layer):
    """Its weights stacked over experts or groups, none of layers that are experts."""
    return () if getattr(layer, "experts_are_layers", False) else layer.weights
