"""Takes rows to the replicas of their experts and brings the answers back."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_moe import functional
from keras_moe.distribution import compatibility
from keras_moe.distribution.messages import other_scope
from keras_moe.distribution.mirrored import exchange
from keras_moe.distribution.mirrored.expert_variable import ExpertVariable
from keras_moe.distribution.topology import Shards


class MirroredDispatcher(functional.Dispatcher):
    """Dropless dispatch over the replicas of a strategy.

    Args:
        engine: The `MirroredEngine`.
    """

    def __init__(self, engine: Any):
        self._engine = engine

    def mix(self, experts, tokens, result, mask=None):
        plan = self.make_plan(result, mask)
        rows = self.at_experts(
            experts,
            plan.dispatch(tokens),
            plan.counts,
            lambda rows, own_counts, _: experts(rows, counts=own_counts),
        )
        outputs = plan.combine(rows, result.gates, tf.shape(tokens)[0])
        return functional.Mixed(outputs, plan.overflow)

    def at_experts(
        self,
        owner: Any,
        rows: tf.Tensor,
        counts: tf.Tensor,
        function: Callable[[tf.Tensor, tf.Tensor, Any], tf.Tensor],
    ) -> tf.Tensor:
        """Runs a function on rows where the weights for them live.

        Args:
            owner: The layer whose stacked weights the function needs.
            rows: `(M, D)` sorted by the first axis of these weights, of length S.
            counts: `(S,)` int32, rows for each entry of that axis.
            function: Takes the rows that arrive, their counts for the entries
                that live here, and the number of rows that come before them in
                the sorted rows of all replicas; returns a row for each row.

        Returns:
            What the function returns, in the order of `rows`.
        """
        replicas = self._engine.replicas
        shards = self._shards_of(owner)
        if shards is None:  # every replica has all of them
            return function(rows, counts, replicas.num_before(tf.shape(rows)[0]))
        all_counts = replicas.gather(counts)
        own = shards.experts_of(replicas.index)
        before = tf.reduce_sum(all_counts[:, : own.start])
        route = exchange.make_route(all_counts, shards, replicas.index)
        arrived = exchange.to_experts(rows, route, self._all_to_all)
        answers = function(arrived, route.counts, before)
        return exchange.from_experts(answers, route, self._all_to_all)

    def _shards_of(self, experts) -> Shards | None:
        strategy, number = self._engine.strategy, self._engine.replicas.number
        for variable in experts.weights:
            if isinstance(variable, ExpertVariable):
                if variable.strategy is not strategy:
                    raise other_scope(
                        f"{experts.name!r} of a strategy with "
                        f"{variable.shards.num_replicas} replicas in a step of "
                        f"another with {number}"
                    )
                return variable.shards
            if not hasattr(variable._value, "_values"):
                raise other_scope(
                    f"{experts.name!r}, built outside of any, in a step on {number} "
                    "replicas"
                )
        return None

    def _all_to_all(self, blocks):
        strategy = self._engine.strategy

        @tf.custom_gradient
        def run(blocks):
            received = compatibility.all_to_all(strategy, blocks)
            return tf.ensure_shape(received, blocks.shape), self._all_to_all

        return run(blocks)
