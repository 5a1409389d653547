"""What layers ask of a mesh: weights with layouts, mixtures, static shapes."""

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe import engine, operations
from keras_moe.distribution import compatibility, slots
from keras_moe.distribution.dtensor.dispatcher import MeshDispatcher
from keras_moe.distribution.dtensor.groups import groups_of
from keras_moe.distribution.dtensor.variables import (
    LaidOutExperts,
    LaidOutVariable,
    in_step,
    on_host,
    replicated,
    sharded_layout,
)
from keras_moe.distribution.dtensor.vocabulary import LaidOutTable, MeshVocabulary
from keras_moe.distribution.vocabulary import SharesWords


class MeshEngine(SharesWords, engine.Engine):
    """Experts shared among the devices of a mesh; one logical replica.

    Args:
        mesh: A mesh of one axis.
    """

    static_shapes = unrolls_loops = True
    values_are_here = False
    several_devices = True
    devices = ""

    def __init__(self, mesh: dtensor.Mesh):
        self.mesh = mesh
        self.devices = f"a mesh of {mesh.size} devices"
        self.weights = _Weights(self)
        self.operations = _Operations(mesh)
        self.dispatcher = self._dispatcher

    def vocabulary_of(self, table):
        if not getattr(table, "is_table", False):
            return None
        return MeshVocabulary(self.mesh, table.num_experts)

    def _dispatcher(self, k, capacity_factor=None, most_experts=None):
        # Gates say -1 for no expert here, in as many columns as they have at most.
        return MeshDispatcher(self.mesh, k, capacity_factor)


class _Weights(engine.Weights):
    def __init__(self, owner):
        self._engine, self._mesh = owner, owner.mesh

    def add_table_weight(self, layer, shape, initializer, name, axis=0, **options):
        self._engine.has_tables = True
        if not self._engine.shards_vocabulary:
            return super().add_table_weight(layer, shape, initializer, name, **options)
        options = {"axis": axis, "name": name, **options}
        return self._add(LaidOutTable, layer, initializer, shape, **options)

    def add_expert_weight(self, layer, shape, initializer, name, together=1, **options):
        options = {"name": name, **options}
        return self._add(LaidOutExperts, layer, initializer, shape, **options)

    def _add(self, kind, layer, initializer, shape, **options):
        if in_step():
            raise ValueError(
                "A layer with experts or shared words must be built before "
                "`strategy.run`, in the scope of the strategy. Received: "
                f"{layer.name!r} built within a step. Use `keras.Input`, or call "
                "`build` in `strategy.scope()`."
            )
        options = {"dtype": layer.variable_dtype, **options}
        with compatibility.layer_name_scope(layer):
            variable = kind(initializer, shape, self._mesh, **options)
        variable.strategy = tf.distribute.get_strategy()
        return compatibility.track_weight(layer, variable)

    def add_group_weight(self, layer, shape, initializer, name):
        # Gates are data-parallel here: every device has the gates of all groups.
        return layer.add_weight(name=name, shape=shape, initializer=initializer)

    def add_slot(self, optimizer, variable, shape, name):
        slots.verify_factored(optimizer, variable, shape)
        return slots.make_slot(optimizer, variable, name, shape=shape)

    def entries_here(self, variable, values):
        if not isinstance(values, np.ndarray):
            return values  # the dispatcher lays them out
        return groups_of(self._mesh).copies(values)

    def left_out_here(self, variable, flags):
        return groups_of(self._mesh).copies(flags, others=True)

    def local_variable(self, value, shape):
        with tf.init_scope(), on_host():
            initial = tf.convert_to_tensor(value())
            rank = initial.shape.rank
            sharded = rank and initial.shape[0] % self._mesh.size == 0
            layout = (
                sharded_layout(self._mesh, rank)
                if sharded
                else dtensor.Layout.replicated(self._mesh, rank)
            )
            return LaidOutVariable(initial, layout=layout, trainable=False)


class _Operations(operations.StaticOperations):
    """The operations of a step whose stock form DTensor cannot expand."""

    # However many: it cannot expand a scatter.
    most_passes = most_columns = 2**31

    def __init__(self, mesh):
        self._mesh = mesh

    products = operations.Operations.products

    def top_k(self, values, k):
        return tf.math.top_k(values, k=k)

    def sum_of_rows(self, values):
        return tf.reduce_sum(values, axis=0)

    def replicated(self, value):
        return replicated(value, self._mesh)

    def over_columns(self, values, function, filling):
        # To the devices of the columns and back, where the stock way would sort
        # all columns on every device.
        values = tf.stop_gradient(values)
        num_tokens, num_experts = values.shape
        rows = -num_tokens % self._mesh.size
        if rows:
            # `Pad` is expanded only if operand and result have one layout.
            values = replicated(values, self._mesh)
            values = tf.pad(values, [[0, rows], [0, 0]], constant_values=filling)
            values = replicated(values, self._mesh)
        missing = -num_experts % self._mesh.size
        values = dtensor.relayout(values, sharded_layout(self._mesh, 2))
        padded = tf.pad(values, [[0, 0], [0, missing]], constant_values=filling)
        padded = dtensor.relayout(padded, sharded_layout(self._mesh, 2))
        columns = dtensor.relayout(padded, sharded_layout(self._mesh, 2, axis=1))
        mask = tf.cast(function(columns), tf.int32)
        mask = dtensor.relayout(mask, sharded_layout(self._mesh, 2, axis=1))
        mask = dtensor.relayout(mask, sharded_layout(self._mesh, 2))
        if rows:
            mask = replicated(replicated(mask, self._mesh)[:num_tokens], self._mesh)
        return mask[:, :num_experts] > 0

    def noise_of(self, noise, mask):
        # Told to be sharded, every device would draw numbers of its own.
        noise = replicated(noise, self._mesh)
        if mask is None:
            return noise
        before = tf.cumsum(
            tf.cast(replicated(mask, self._mesh), tf.int32), exclusive=True
        )
        return tf.gather(noise, before)
