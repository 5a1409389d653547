"""Variables that have a layout on a mesh, and read as plain arrays from Python.

Within a step (`DTensorStrategy.run`) a variable is a DTensor. Outside of it, in
callbacks, when weights are saved, printed or set, it reads and writes as the whole
array of one device.
"""

import contextlib
import threading
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe.distribution import compatibility
from keras_moe.distribution.dtensor.groups import groups_of

_thread = threading.local()

# Set on the shape of slices of a gradient: what makes them dense, where that is known.
DENSE_BY = "_keras_moe_dense_by"


def current_mesh() -> dtensor.Mesh | None:
    """The mesh of the step whose code runs here, None outside of steps."""
    meshes = getattr(_thread, "meshes", None)
    return meshes[-1] if meshes else None


def in_step() -> bool:
    """Whether code of a step of a `DTensorStrategy` runs here."""
    return current_mesh() is not None


@contextlib.contextmanager
def step(mesh: dtensor.Mesh):
    """A context within which variables are DTensors."""
    if not hasattr(_thread, "meshes"):
        _thread.meshes = []
    _thread.meshes.append(mesh)
    try:
        yield
    finally:
        _thread.meshes.pop()


def on_host():
    """The device on which whole arrays live, whatever the surrounding scope says."""
    return tf.device("CPU:0")


def sharded_layout(mesh: dtensor.Mesh, rank: int, axis: int = 0) -> dtensor.Layout:
    """The layout of a tensor whose `axis` is shared among the devices."""
    specs = [dtensor.UNSHARDED] * rank
    specs[axis] = mesh.dim_names[0]
    return dtensor.Layout(specs, mesh)


def replicated(value: tf.Tensor, mesh: dtensor.Mesh | None = None) -> tf.Tensor:
    """The same DTensor, whole on every device of a mesh, by default that of the step."""
    mesh = mesh or current_mesh()
    return dtensor.relayout(value, dtensor.Layout.replicated(mesh, value.shape.rank))


def by_rows(value: tf.Tensor, mesh: dtensor.Mesh) -> tf.Tensor:
    """The same DTensor with its rows sharded if the mesh divides them, else whole."""
    rank = value.shape.rank
    if rank < 2 or value.shape[0] % mesh.size:
        return replicated(value, mesh)
    return dtensor.relayout(value, sharded_layout(mesh, rank))


def whole(value: Any) -> tf.Tensor:
    """A DTensor as one plain tensor. With several clients all of them have to ask.

    Args:
        value: A DTensor, outside of a graph.

    Returns:
        A tensor on the host.
    """
    layout = dtensor.fetch_layout(value)
    if not layout.is_fully_replicated():
        parts = _local_whole(value, layout)
        if parts is not None:
            return parts
        replicated = dtensor.Layout.replicated(layout.mesh, value.shape.rank)
        value = dtensor.relayout(value, replicated)
    part = dtensor.unpack(value)[0]
    with on_host():
        return tf.identity(part)


def _local_whole(value, layout):
    """Joined from the devices of this process, if they hold it all."""
    if layout.mesh.num_local_devices() != layout.mesh.size:
        return None
    axis = layout.sharding_specs.index(layout.mesh.dim_names[0])
    parts = dtensor.unpack(value)
    with on_host():
        return tf.concat([tf.identity(part) for part in parts], axis=axis)


def lay_out(value: Any, layout: dtensor.Layout) -> tf.Tensor:
    """Puts a plain tensor on the mesh.

    What is replicated comes from the first client, so that clients cannot diverge,
    whatever their seeds; a shard comes from the client of its device.

    Args:
        value: A plain tensor or array, outside of a graph.
        layout: With at most one sharded axis, of a size that the mesh divides.

    Returns:
        A DTensor.
    """
    mesh = layout.mesh
    with on_host():
        value = tf.convert_to_tensor(value)
    local = mesh.num_local_devices()
    if layout.is_fully_replicated():
        packed = dtensor.pack([value] * local, layout)
        return packed if local == mesh.size else _of_first_client(packed, layout)
    axis = layout.sharding_specs.index(mesh.dim_names[0])
    with on_host():
        parts = tf.split(value, mesh.size, axis=axis)
    first = dtensor.client_id() * local
    return dtensor.pack(parts[first : first + local], layout)


def _of_first_client(value, layout):
    """The value of the first client for all; each holds its own until now."""
    mesh = layout.mesh
    local = mesh.num_local_devices()
    dtype = value.dtype
    parts = dtensor.unpack(value)
    is_first = dtensor.client_id() == 0
    with on_host():
        part = tf.identity(parts[0])
        if dtype in (tf.bool, tf.uint32, tf.uint64, tf.int8, tf.uint8, tf.int16):
            part = tf.cast(part, tf.int64)
        rows = [
            part[tf.newaxis] if is_first and i == 0 else tf.zeros_like(part)[tf.newaxis]
            for i in range(local)
        ]
    stacked = dtensor.pack(rows, sharded_layout(mesh, part.shape.rank + 1))

    @tf.function
    def add(stacked):
        return dtensor.relayout(tf.cast(tf.reduce_sum(stacked, axis=0), dtype), layout)

    return add(stacked)


class LaidOutVariable(dtensor.DVariable):
    """A `tf.Variable` with a layout, the same array for Python on any mesh.

    Args:
        initial_value: A plain tensor.
        layout: Its `dtensor.Layout`. An axis that is sharded is padded with zeros to a
            size that the mesh divides.
        of_experts: Bool. Whether every group of devices has a copy of it. Then it
            is stored as `(G * E, ...)`, see `groups`. Defaults to `False`.
        **kwargs: Those of `tf.Variable`.
    """

    def __init__(
        self,
        initial_value: Any,
        layout: dtensor.Layout,
        of_experts: bool = False,
        **kwargs: Any,
    ):
        with on_host():
            initial_value = tf.convert_to_tensor(
                initial_value, dtype=kwargs.get("dtype")
            )
        self.whole_shape = initial_value.shape
        self._target = layout
        self._groups = groups_of(layout.mesh) if of_experts else None
        with step(layout.mesh):
            super().__init__(lay_out(self._stored(initial_value), layout), **kwargs)

    @property
    def num_copies(self) -> int:
        """G, copies of the whole that are stored one after the other."""
        return self._groups.number if self._groups else 1

    @property
    def _axis(self):
        """The one that is sharded, 0 if none is."""
        specs = list(self._target.sharding_specs)
        name = self._target.mesh.dim_names[0]
        return specs.index(name) if name in specs else 0

    @property
    def _missing_rows(self):
        """Padding that makes the axis of a copy one that its devices divide."""
        layout, shape = self._target, self.whole_shape
        if layout.is_fully_replicated() or not shape.rank:
            return 0
        return -shape[self._axis] % (layout.mesh.size // self.num_copies)

    def _stored(self, value):
        missing = self._missing_rows
        with on_host():
            if missing:
                rest = [[0, 0] for _ in value.shape]
                rest[self._axis][1] = missing
                value = tf.pad(value, rest)
            if self.num_copies > 1:
                value = tf.concat([value] * self.num_copies, axis=0)
        return value

    def _read_variable_op(self, no_copy=False):
        value = super()._read_variable_op(no_copy)
        if in_step():
            # No optimizer: DTensor cannot expand it in the conditions of some.
            if self.num_copies > 1 and self.trainable and compatibility.is_recording():
                return _with_sums_of_copies(value, self._groups)
            return value
        if tf.executing_eagerly():
            value = whole(value)
        if self._missing_rows or self.num_copies > 1:
            real = slice(self.whole_shape[self._axis])
            with on_host():
                value = value[(*[slice(None)] * self._axis, real)]
        return value

    def _laid_out(self, value):
        if in_step() or not tf.executing_eagerly():
            return value
        with on_host():
            if not tf.is_tensor(value) or not dtensor.is_dtensor(value):
                value = tf.cast(value, self.dtype)
        if dtensor.is_dtensor(value):
            value = whole(value)
        return lay_out(self._stored(value), self._target)

    def assign(self, value, use_locking=None, name=None, read_value=True):
        return self._written(super().assign, value, use_locking, name, read_value)

    def assign_add(self, delta, use_locking=None, name=None, read_value=True):
        return self._written(super().assign_add, delta, use_locking, name, read_value)

    def assign_sub(self, delta, use_locking=None, name=None, read_value=True):
        return self._written(super().assign_sub, delta, use_locking, name, read_value)

    # DTensor has no scatter into a variable. Optimizers add slices of gradients.
    def scatter_add(self, sparse_delta, use_locking=False, name=None):
        return self.assign_add(self._dense(sparse_delta), use_locking, name)

    def scatter_sub(self, sparse_delta, use_locking=False, name=None):
        return self.assign_sub(self._dense(sparse_delta), use_locking, name)

    def _dense(self, slices):
        if hasattr(slices.dense_shape, DENSE_BY):
            return tf.convert_to_tensor(slices)
        # With the shape as a constant: it is not always known from the slices.
        shape = tf.constant(self.shape.as_list(), tf.int64)
        return tf.convert_to_tensor(
            tf.IndexedSlices(slices.values, slices.indices, shape)
        )

    def _written(self, write, value, use_locking, name, read_value):
        value = self._laid_out(value)
        with step(self._target.mesh):
            return write(value, use_locking, name, read_value)

    def _dense_var_to_tensor(self, dtype=None, name=None, as_ref=False):
        value = self.value()
        return value if dtype is None else tf.cast(value, dtype)

    # Files hold whole arrays, as those of one device.
    def _gather_saveables_for_checkpoint(self):
        raise NotImplementedError

    def _serialize_to_tensors(self):
        return {"VARIABLE_VALUE": self.read_value()}

    def _restore_from_tensors(self, restored_tensors):
        self.assign(restored_tensors["VARIABLE_VALUE"])
        return self

    def _export_to_saved_model_graph(self, *args, **kwargs):
        raise ValueError(
            "A model on a mesh cannot be written as a SavedModel as it is. Received: "
            f"weight {self.name!r} with the layout {self._target.sharding_specs}. Use "
            "keras_moe.serving.export, which writes the model of one device."
        )


def _with_sums_of_copies(value, groups):
    """The same copies; the gradient of each is the sum of those of all."""

    @tf.custom_gradient
    def read(value):
        return tf.identity(value), groups.sum_of_copies

    return read(value)


class LaidOutExperts(keras.Variable):
    """A Keras variable `(E, ...)`, its experts shared among the devices of a mesh.

    Where the devices of a group do not divide E there are further experts of zeros,
    which take no tokens, and where there are several groups a copy for each: they are
    seen within a step only.

    Args:
        initializer: Keras initializer of the whole array.
        shape: `(E, ...)`.
        mesh: The mesh.
        **kwargs: Those of `keras.Variable`.
    """

    def __init__(self, initializer: Any, shape: tuple, mesh: dtensor.Mesh, **kwargs):
        self._mesh = mesh
        # In whose scope it was made; set by what makes it.
        self.strategy: Any = None
        super().__init__(keras.initializers.get(initializer), shape=shape, **kwargs)

    def sharded_alike(
        self, initializer: Any, shape: tuple, **kwargs: Any
    ) -> "LaidOutExperts":
        """Another variable whose first axis is laid out as this one's: its state."""
        # Within a step `shape` may be the stored one.
        shape = (self.num_experts, *shape[1:])
        return LaidOutExperts(initializer, shape, self._mesh, **kwargs)

    def _initialize_with_initializer(self, initializer):
        shape, dtype = tuple(self._shape), self._dtype
        with tf.init_scope(), on_host():
            value = tf.convert_to_tensor(initializer(shape, dtype=dtype))
            self._value = LaidOutVariable(
                value,
                layout=sharded_layout(self._mesh, len(shape)),
                of_experts=True,
                trainable=self.trainable,
                dtype=dtype,
                name=self.name,
            )

    @property
    def mesh(self) -> dtensor.Mesh:
        """The mesh over which it lies."""
        return self._mesh

    @property
    def num_experts(self) -> int:
        """E, without padding."""
        return self._shape[0]

    @property
    def num_copies(self) -> int:
        """G, groups of devices with a copy each."""
        return groups_of(self._mesh).number

    @property
    def shape(self) -> tf.TensorShape:
        """Shape of all experts, within a step with the padding and of all copies."""
        value = self._value
        if value is None or not in_step():
            return tf.TensorShape(self._shape)
        return value.shape

    def numpy(self) -> np.ndarray:
        """All experts. With several clients all of them have to ask."""
        return self._value.numpy()

    def __array__(self, dtype=None):
        return np.asarray(self.numpy(), dtype)


__all__ = [
    "LaidOutExperts",
    "LaidOutVariable",
    "by_rows",
    "compatibility",
    "current_mesh",
    "in_step",
    "lay_out",
    "replicated",
    "sharded_layout",
    "step",
    "whole",
]
