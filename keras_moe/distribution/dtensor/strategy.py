"""A `tf.distribute.Strategy` whose variables and batches have DTensor layouts."""

import contextlib
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe.distribution import compatibility
from keras_moe.distribution.dtensor import mesh as meshes
from keras_moe.distribution.dtensor import training
from keras_moe.distribution.dtensor.engine import MeshEngine
from keras_moe.distribution.dtensor.variables import (
    LaidOutVariable,
    lay_out,
    on_host,
    replicated,
    sharded_layout,
    step,
)


class DTensorStrategy(tf.distribute.Strategy):
    """Experts shared among the devices of a mesh, for stock `model.fit`.

    Within its scope every weight gets a layout: those of experts are sharded over
    the mesh, or over each group of `expert_parallel_size` of its devices, all others
    are replicated. A batch is sharded over its first axis, so what comes before and
    after a mixture is data-parallel by layout. TensorFlow sees one model and one
    batch: losses, metrics, norms of gradients and batch statistics are those of the
    whole batch on any number of devices.

    A batch whose size the mesh does not divide is computed by every device as a
    whole: right, but without gain.

    With several clients (processes) every client runs the same program. Of a batch
    each takes the part of its own devices; feed all of them the same batches to
    train as one process would. What is replicated at the start comes from the first
    client, so clients with different seeds do not diverge.

    Args:
        mesh: A `dtensor.Mesh` of one axis, see `create_mesh`.

    Raises:
        ValueError: The mesh has more than one axis, or devices that are not in order;
            a setting under which DTensor gives wrong results cannot be changed any
            more.

    Example:

    >>> mesh = keras_moe.distribution.create_mesh(1, device_type="CPU")
    >>> with keras_moe.distribution.DTensorStrategy(mesh).scope():
    ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    ...     model.compile("adam", "mse")
    >>> model.predict(np.ones((2, 4)), verbose=0).shape
    (2, 1)

    Reference:
        Shazeer et al. 2017, section 3.1: layers and gate data-parallel, one copy of
        every expert.
    """

    def __init__(self, mesh: dtensor.Mesh):
        meshes.verify_mesh(mesh)
        meshes.verify_settings(mesh)
        self.mesh = mesh
        self.engine = MeshEngine(mesh)
        super().__init__(_Extended(self, mesh))
        training.install()

    def lay_out(self, batch: Any) -> Any:
        """Lays out the arrays of a batch on the mesh; what is laid out stays so.

        Args:
            batch: Any structure of tensors and arrays.

        Returns:
            The same structure of DTensors.
        """

        def each(value):
            if tf.is_tensor(value) and dtensor.is_dtensor(value):
                return value
            if isinstance(value, (tf.Tensor, np.ndarray)):
                return lay_out_batch(tf.convert_to_tensor(value), self.mesh)
            return value

        return tf.nest.map_structure(each, batch)


class _Context(compatibility.ReplicaContext):
    """The one logical replica of a step."""

    def all_reduce(self, reduce_op, value, options=None):
        return value

    def all_gather(self, value, axis, options=None):
        return value


class _Extended(tf.distribute.StrategyExtended):
    """How the strategy makes variables and runs steps."""

    def __init__(self, strategy, mesh):
        super().__init__(strategy)
        self._mesh = mesh
        self._retrace_functions_for_each_device = False

    # Variables.

    def _create_variable(self, next_creator, **kwargs):
        if not tf.TensorShape(kwargs.get("shape")).is_fully_defined() and (
            kwargs.get("shape") is not None
        ):
            # No layout has an open shape. Steps do not use such variables.
            with on_host():
                return next_creator(**kwargs)
        initial_value, dtype = kwargs.pop("initial_value"), kwargs.get("dtype")
        # On the host: many initializers use operations that DTensor cannot expand.
        with on_host():
            value = initial_value() if callable(initial_value) else initial_value
            value = tf.convert_to_tensor(value, dtype=dtype)
        kept = {k: kwargs[k] for k in ("trainable", "name", "dtype") if k in kwargs}
        layout = dtensor.Layout.replicated(self._mesh, value.shape.rank)
        return LaidOutVariable(value, layout=layout, **kept)

    def variable_created_in_scope(self, v):
        return True

    def _colocate_vars_with(self, colocate_with_variable):
        return contextlib.nullcontext()

    def colocate_vars_with(self, colocate_with_variable):
        return contextlib.nullcontext()

    # Steps.

    @property
    def _num_replicas_in_sync(self):
        return 1

    def call_for_each_replica(self, fn, args=(), kwargs=None):
        """Runs the one logical replica. See `tf.distribute.Strategy.run`."""
        strategy = self._container_strategy()
        context = _Context(strategy, replica_id_in_sync_group=0)
        with strategy.scope(), context, step(self._mesh):
            outputs = fn(*args, **(kwargs or {}))
            # Python gets whole arrays; for scalars this is no work.
            return tf.nest.map_structure(self._replicated, outputs)

    def _replicated(self, value):
        if not isinstance(value, tf.Tensor):
            return value
        return replicated(value, self._mesh)

    def _update(self, var, fn, args, kwargs, group):
        return self._update_non_slot(var, fn, (var, *args), kwargs, group)

    def _update_non_slot(self, colocate_with, fn, args, kwargs, group):
        with compatibility.UpdateContext(colocate_with):
            result = fn(*args, **kwargs)
        return result if group else tf.nest.map_structure(self._local_results, result)

    def _local_results(self, val):
        return (val,)

    def value_container(self, val):
        return val

    def _reduce_to(self, reduce_op, value, destinations, options):
        return value

    def _batch_reduce_to(self, reduce_op, value_destination_pairs, options):
        return [value for value, _ in value_destination_pairs]

    def _gather_to_implementation(self, value, destinations, axis, options):
        return value

    def _in_multi_worker_mode(self):
        return False

    def _use_merge_call(self):
        return True

    def _get_local_replica_id(self, replica_id_in_sync_group):
        return replica_id_in_sync_group

    def _get_replica_id_in_sync_group(self, replica_id):
        return replica_id

    @property
    def worker_devices(self):
        return tuple(self._mesh.local_devices())

    @property
    def parameter_devices(self):
        return self.worker_devices

    def _default_device_scope(self):
        return contextlib.nullcontext()

    # Batches.

    def _experimental_distribute_dataset(self, dataset, options):
        return Batches(dataset, self._mesh)


class Batches:
    """A dataset whose batches are laid out on a mesh as they come.

    Args:
        dataset: A `tf.data.Dataset`.
        mesh: The mesh.
    """

    def __init__(self, dataset: tf.data.Dataset, mesh: dtensor.Mesh):
        self._dataset = dataset
        self._mesh = mesh

    @property
    def element_spec(self) -> Any:
        """That of the dataset: of whole batches."""
        return self._dataset.element_spec

    def __iter__(self):
        with on_host():
            batches = iter(self._dataset)
        while True:
            with on_host():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield tf.nest.map_structure(self._laid_out, batch)

    def _laid_out(self, tensor):
        if not isinstance(tensor, tf.Tensor):
            return tensor
        return lay_out_batch(tensor, self._mesh)


def lay_out_batch(tensor: tf.Tensor, mesh: dtensor.Mesh) -> tf.Tensor:
    """Shards a tensor over its first axis if the mesh divides it, else replicates."""
    rank = tensor.shape.rank
    if rank and tensor.shape[0] and tensor.shape[0] % mesh.size == 0:
        return lay_out(tensor, sharded_layout(mesh, rank))
    return lay_out(tensor, dtensor.Layout.replicated(mesh, rank))


__all__ = ["Batches", "DTensorStrategy", "lay_out_batch"]
