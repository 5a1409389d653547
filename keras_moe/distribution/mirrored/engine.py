"""Experts sharded over the replicas of (MultiWorker)MirroredStrategy."""

import weakref
from functools import partial
from typing import Any

import tensorflow as tf

from keras_moe import engine, operations
from keras_moe.distribution import compatibility, slots
from keras_moe.distribution.messages import other_scope
from keras_moe.distribution.mirrored import (
    exchange,
    expert_layers,
    hierarchical,
    optimization,
    recurrence,
    repairs,
    training,
)
from keras_moe.distribution.mirrored.capacity import Capacity
from keras_moe.distribution.mirrored.dispatcher import MirroredDispatcher
from keras_moe.distribution.mirrored.expert_variable import (
    GROUP,
    HOLDERS,
    ExpertVariable,
)
from keras_moe.distribution.mirrored.vocabulary import ShardedVocabulary
from keras_moe.distribution.topology import make_shards
from keras_moe.distribution.vocabulary import SharesWords


class MirroredEngine(SharesWords, engine.Engine):
    """One shard of every mixture's experts on each replica of a strategy.

    Args:
        strategy: A mirrored strategy with several replicas.
    """

    def __init__(self, strategy: Any):
        self._strategy = weakref.ref(strategy)
        # Set when the first layer of this package is built: losses are then those of
        # the global batch.
        self.has_layers = False
        # Set when the first experts are sharded.
        self.has_experts = False
        # Replicas that hold all experts together.
        self.group_size = strategy.num_replicas_in_sync
        self.weights = _Weights(self)
        self.replicas = _Replicas(self)
        self.operations = _Operations(self)
        self.dispatcher = self._dispatcher
        self.hierarchical_mixture = partial(hierarchical.mix_at_groups, self)

    def note_layer(self):
        self.has_layers = True

    def _dispatcher(self, k, capacity_factor=None, most_experts=None):
        if capacity_factor is None:
            return MirroredDispatcher(self)
        return MirroredDispatcher(self, Capacity(capacity_factor, most_experts))

    def run_each(self, owner, experts, calls):
        return expert_layers.run_each(self.replicas, owner, experts, calls)

    @property
    def strategy(self) -> Any:
        """The `tf.distribute.Strategy`."""
        return self._strategy()

    def vocabulary_of(self, table):
        if not getattr(table, "is_table", False):
            return None
        if table.strategy is not self.strategy:
            raise other_scope(
                f"{table.path!r} of a strategy with {table.shards.num_replicas} replicas "
                f"in a step of another with {self.replicas.number}"
            )
        return ShardedVocabulary(self.replicas, table.shards)

    def set_group_size(self, size: int) -> None:
        """Sets how many replicas hold all experts together.

        Args:
            size: Divides the number of replicas.

        Raises:
            ValueError: It is another than that of experts that were built.
        """
        if size == self.group_size:
            return
        if self.has_experts:
            raise ValueError(
                "`size` must be set before layers with experts are built in the scope "
                f"of the strategy. Received: size={size} after experts were built for "
                f"{self.group_size}. Set it right after making the strategy."
            )
        self.group_size = size
        number = self.replicas.number
        compatibility.split_collectives(
            self.strategy,
            {
                GROUP: [range(i, i + size) for i in range(0, number, size)],
                HOLDERS: [range(i, number, size) for i in range(size)],
            },
        )


class _Weights(engine.Weights):
    def __init__(self, owner):
        self._engine = owner

    def add_expert_weight(self, layer, shape, initializer, name, together=1, **options):
        size = self._engine.group_size
        if getattr(layer, "groups_are_shared_by_all", False):
            size = self._engine.replicas.number
        shards = make_shards(shape[0], self._engine.replicas.number, together, size)
        return self._add(layer, initializer, shape, shards, name=name, **options)

    def add_table_weight(self, layer, shape, initializer, name, axis=0, **options):
        self._engine.note_layer()
        self._engine.has_tables = True
        if not self._engine.shards_vocabulary:
            return super().add_table_weight(layer, shape, initializer, name, **options)
        # Words have no groups: all replicas share them out.
        shards = make_shards(shape[axis], self._engine.replicas.number)
        options = {"axis": axis, "is_table": True, "name": name, **options}
        return self._add(layer, initializer, shape, shards, **options)

    def _add(self, layer, initializer, shape, shards, **options):
        self._engine.note_layer()
        self._engine.has_experts = True
        options = {"dtype": layer.variable_dtype, **options}
        with compatibility.layer_name_scope(layer):
            variable = ExpertVariable(
                initializer, shape, self._engine.strategy, shards, **options
            )
        return compatibility.track_weight(layer, variable)

    def sum_of_parts(self, variable, value):
        shards = variable.shards
        if shards.group_size == 1:
            return value  # all experts are here
        return self._engine.replicas.sum(value) / shards.num_groups

    def note_experts(self, variables):
        self._engine.note_layer()
        for variable in variables:
            self._engine.has_experts = True
            variable.of_experts = self._engine.replicas.number

    def add_slot(self, optimizer, variable, shape, name):
        slots.verify_factored(optimizer, variable, shape)
        if len(variable.shape) < 3:
            raise ValueError(
                "A sharded weight must have an axis besides that of the experts for "
                "each axis that is averaged. Received: "
                f"{type(optimizer).__name__} with state of shape {tuple(shape)} for "
                f"{variable.path!r} of shape {tuple(variable.shape)}. Factor the "
                "kernels of the experts only."
            )
        return slots.make_slot(optimizer, variable, name, shape=shape)

    def entries_here(self, variable, values):
        if not isinstance(variable, ExpertVariable):
            return values
        own = variable.shards.experts_of(self._engine.replicas.index)
        return values[own.start : own.stop]

    def local_variable(self, value, shape):
        strategy = self._engine.strategy
        device = strategy.extended.worker_devices[compatibility.local_replica(strategy)]
        with tf.init_scope(), tf.device(device):
            # Not by way of the strategy, which would make one for each replica.
            return compatibility.ResourceVariable(value(), shape=shape, trainable=False)


class _Replicas(engine.Replicas):
    def __init__(self, owner):
        self._engine = owner
        self.number = owner.strategy.num_replicas_in_sync

    @property
    def index(self) -> int:  # type: ignore[override]
        return compatibility.replica_here()

    def sum(self, value):
        _verify_graph()
        strategy = self._engine.strategy

        @tf.custom_gradient
        def run(value):
            return compatibility.all_reduce(strategy, value), self.sum

        return run(value)

    def gather(self, value, among=None):
        """As of the base; `among` a part of the replicas, see `compatibility`."""
        _verify_graph()
        value = tf.stop_gradient(tf.convert_to_tensor(value))
        strategy = self._engine.strategy
        found = compatibility.all_gather(strategy, value[tf.newaxis], among)
        return tf.ensure_shape(found, (None, *value.shape))

    def exchange(self, blocks, among=None):
        """`(P, ...)`: block r goes to replica r, and its block comes back.

        Its gradient is itself; `among` a part of the replicas, see `compatibility`.
        """
        _verify_graph()
        strategy = self._engine.strategy

        @tf.custom_gradient
        def run(blocks):
            received = compatibility.all_to_all(strategy, blocks, among)
            received = tf.ensure_shape(received, blocks.shape)
            return received, partial(self.exchange, among=among)

        return run(blocks)

    def num_before(self, num_rows):
        noted = recurrence.rows_before()
        if noted is not None and compatibility.is_in_loop():
            return noted
        rows = self.gather(tf.cast(num_rows, tf.int32))
        return tf.reduce_sum(rows[: self.index])

    def before_loop(self, num_rows):
        return recurrence.noted(self.num_before(num_rows))


class _Operations(operations.Operations):
    def __init__(self, owner):
        self._engine = owner

    def over_columns(self, values, function, filling):
        replicas, strategy = self._engine.replicas, self._engine.strategy
        return exchange.over_columns(
            values,
            replicas.gather(tf.shape(values)[0]),
            replicas.number,
            function,
            filling,
            lambda blocks: compatibility.all_to_all(strategy, blocks),
        )


def _verify_graph():
    if tf.executing_eagerly():
        raise ValueError(
            "Sharded experts exchange their rows within a `tf.function` only. "
            "Received: an eager step. Leave `run_eagerly` False, or put "
            "`strategy.run` into a `tf.function`."
        )
    if compatibility.is_in_loop():
        raise ValueError(
            "Replicas cannot exchange values within a loop, whose name differs between "
            "them: all would wait. Received: a layer that sums or exchanges over the "
            "replicas (a `MoE`, or a gate such as `LossFreeGating`) in a loop of a step. "
            "Pass `unroll=True` to the recurrent layer around it, or use `MoELSTM`."
        )


_engines: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def engine_of(strategy: Any) -> MirroredEngine:
    """The engine for a mirrored strategy with several replicas.

    Args:
        strategy: A `MirroredStrategy` or `MultiWorkerMirroredStrategy`.

    Returns:
        Always the same for the same strategy.

    Raises:
        ValueError: The strategy mixes kinds of devices, or has them in another order
            than that of their numbers.
    """
    found = _engines.get(strategy)
    if found is not None:
        return found
    kind, devices = type(strategy).__name__, strategy.extended.worker_devices
    if compatibility.collective_ops_of(strategy) is None:
        raise ValueError(
            "`strategy` must have devices of one kind, so that they can exchange "
            f"rows by collectives. Received: {kind} on {list(devices)}."
        )
    numbers = [tf.DeviceSpec.from_string(device).device_index for device in devices]
    if numbers != sorted(numbers):
        raise ValueError(
            "`strategy` must have its devices in the order of their numbers, in which "
            f"collectives see them. Received: {kind} on {list(devices)}. Pass them in "
            "ascending order; `CUDA_VISIBLE_DEVICES` gives GPUs other numbers."
        )
    optimization.install()
    training.install()
    repairs.install()
    recurrence.install()
    compatibility.separate_collectives(strategy)
    _engines[strategy] = MirroredEngine(strategy)
    return _engines[strategy]
