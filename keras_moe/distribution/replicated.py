"""Experts sharded over the replicas of (MultiWorker)MirroredStrategy."""

import weakref
from typing import Any

import tensorflow as tf

from keras_moe import placement
from keras_moe.distribution import (
    compatibility,
    exchange,
    optimization,
    repairs,
    slots,
    training,
)
from keras_moe.distribution.expert_variable import ExpertVariable
from keras_moe.distribution.topology import Shards, make_shards

_SUPPORTED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


class ReplicatedPlacement(placement.Placement):
    """One shard of every mixture's experts on each replica of a strategy.

    Args:
        strategy: A mirrored strategy with several replicas.
    """

    def __init__(self, strategy: Any):
        self._strategy = weakref.ref(strategy)
        self.num_replicas = strategy.num_replicas_in_sync
        # Set when the first experts are sharded: losses are then those of the
        # global batch.
        self.has_experts = False

    @property
    def strategy(self) -> Any:
        """The `tf.distribute.Strategy`."""
        return self._strategy()

    @property
    def replica(self) -> int:  # type: ignore[override]
        """The replica whose code runs here."""
        return compatibility.replica_here()

    def add_expert_weight(self, layer, shape, initializer, name, together=1):
        shards = make_shards(shape[0], self.num_replicas, together)
        self.has_experts = True
        with compatibility.layer_name_scope(layer):
            variable = ExpertVariable(
                initializer,
                shape,
                self.strategy,
                shards,
                dtype=layer.variable_dtype,
                name=name,
            )
        return compatibility.track_weight(layer, variable)

    def add_slot(self, optimizer, variable, shape, name):
        if len(variable.shape) < 3:
            raise ValueError(
                "A sharded weight must have an axis besides that of the experts for "
                "each axis that is averaged. Received: "
                f"{type(optimizer).__name__} with state of shape {tuple(shape)} for "
                f"{variable.path!r} of shape {tuple(variable.shape)}. Factor the "
                "kernels of the experts only."
            )
        return slots.make_slot(optimizer, variable, name, shape=shape)

    def at_home(self, owner, rows, counts, function):
        shards = self._shards_of(owner)
        if shards is None:  # every replica has all of them
            return function(rows, counts, self.num_before(tf.shape(rows)[0]))
        self._verify_graph()
        all_counts = self.gather(counts)
        own = shards.experts_of(self.replica)
        before = tf.reduce_sum(all_counts[:, : own.start])
        route = exchange.make_route(all_counts, shards, self.replica)
        arrived = exchange.to_experts(rows, route, self._all_to_all)
        answers = function(arrived, route.counts, before)
        return exchange.from_experts(answers, route, self._all_to_all)

    def entries_here(self, variable, values):
        if not isinstance(variable, ExpertVariable):
            return values
        own = variable.shards.experts_of(self.replica)
        return values[own.start : own.stop]

    def own_entries(self, num_entries):
        return make_shards(num_entries, self.num_replicas).experts_of(self.replica)

    def over_columns(self, values, function, filling):
        self._verify_graph()
        return exchange.over_columns(
            values,
            self.gather(tf.shape(values)[0]),
            self.num_replicas,
            function,
            filling,
            lambda blocks: compatibility.all_to_all(self.strategy, blocks),
        )

    def _shards_of(self, experts) -> Shards | None:
        for variable in experts.weights:
            if isinstance(variable, ExpertVariable):
                if variable.strategy is not self.strategy:
                    raise ValueError(
                        "A layer must run under the strategy in whose scope it was "
                        f"built. Received: {experts.name!r} of a strategy with "
                        f"{variable.shards.num_replicas} replicas in a step of "
                        f"another with {self.num_replicas}. Build the model again in "
                        "the new scope and load its weights there."
                    )
                return variable.shards
            if not hasattr(variable._value, "_values"):
                raise ValueError(
                    "A layer with experts must be built in the scope of the "
                    f"strategy it runs under. Received: {experts.name!r}, built "
                    f"outside, in a step on {self.num_replicas} replicas. Build the "
                    "model within `with strategy.scope():`."
                )
        return None

    def _verify_graph(self):
        if tf.executing_eagerly():
            raise ValueError(
                "Sharded experts exchange their rows within a `tf.function` only. "
                "Received: an eager step. Leave `run_eagerly` False, or put "
                "`strategy.run` into a `tf.function`."
            )

    def _all_to_all(self, blocks):
        @tf.custom_gradient
        def run(blocks):
            received = compatibility.all_to_all(self.strategy, blocks)
            return tf.ensure_shape(received, blocks.shape), self._all_to_all

        return run(blocks)

    def local_variable(self, value, shape):
        device = self.strategy.extended.worker_devices[
            compatibility.local_replica(self.strategy)
        ]
        with tf.init_scope(), tf.device(device):
            # Not by way of the strategy, which would make one for each replica.
            return compatibility.ResourceVariable(value(), shape=shape, trainable=False)

    def sum(self, value):
        self._verify_graph()

        @tf.custom_gradient
        def run(value):
            return compatibility.all_reduce(self.strategy, value), self.sum

        return run(value)

    def gather(self, value):
        self._verify_graph()
        value = tf.stop_gradient(tf.convert_to_tensor(value))
        return compatibility.all_gather(self.strategy, value[tf.newaxis])

    def num_before(self, num_rows):
        rows = self.gather(tf.cast(num_rows, tf.int32))
        return tf.reduce_sum(rows[: self.replica])


_placements: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def placement_of(strategy: Any) -> placement.Placement:
    """The placement of experts under a strategy.

    Args:
        strategy: A `tf.distribute.Strategy`.

    Returns:
        `placement.ONE_DEVICE` for a single replica, else a
        `ReplicatedPlacement`, always the same for the same strategy.

    Raises:
        ValueError: The strategy is neither `MirroredStrategy` nor
            `MultiWorkerMirroredStrategy`, or it mixes kinds of devices.
    """
    found = _placements.get(strategy)
    if found is not None:
        return found
    kind = type(strategy).__name__
    if isinstance(strategy, _SUPPORTED):
        several = strategy.num_replicas_in_sync > 1
    elif isinstance(strategy, tf.distribute.OneDeviceStrategy):
        several = False
    else:
        raise ValueError(
            "`strategy` must be a MirroredStrategy or a MultiWorkerMirroredStrategy "
            f"for layers with experts. Received: {kind}. Build the model in the scope "
            "of one of these, or outside of any."
        )
    if not several:
        return placement.ONE_DEVICE
    if compatibility.collective_ops_of(strategy) is None:
        devices = strategy.extended.worker_devices
        raise ValueError(
            "`strategy` must have devices of one kind, so that they can exchange "
            f"rows by collectives. Received: {kind} on {list(devices)}."
        )
    optimization.install()
    training.install()
    repairs.install()
    compatibility.separate_collectives(strategy)
    _placements[strategy] = ReplicatedPlacement(strategy)
    return _placements[strategy]
