"""Groups of a mesh's devices, each of which holds all experts.

A mesh has one axis, over which the batch is sharded. Its R devices fall into G groups
of P that follow each other, and device p of every group has the same experts. Weights of
experts are stored as G copies, `(G * E, ...)`, sharded over the mesh: of E a device
holds E / P. Tokens travel within a group, and the gradients of the copies are summed.

DTensor exchanges over a whole axis of a mesh only. What it cannot say, an exchange among
some of the devices, is said to the devices themselves: within a "parted" layout
every device runs an operation on what it holds, here a collective of its own group.
"""

import functools
import itertools
import os
import re
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe.distribution import compatibility

# DTensor passes on operations that it does not know only if told so, one by one.
PASSED_ON = "DTENSOR_ENABLE_REPLICATED_SPMD_AS_DEFAULT_TF."
_COLLECTIVES = ("COLLECTIVEALLTOALLV2", "COLLECTIVEREDUCEV2")

# No two collectives of a group may have the same one.
_instance_keys = itertools.count(1)


def name_of(expert_parallel_size: int | None) -> str:
    """The name of a mesh, which every layout knows, and with it the size of groups.

    Args:
        expert_parallel_size: P; None for all devices.
    """
    if expert_parallel_size is None:
        return ""
    return f"experts_over_{expert_parallel_size}"


@functools.lru_cache(maxsize=32)
def groups_of(mesh: dtensor.Mesh) -> "Groups":
    """The groups of a mesh, as `create_mesh` has named it."""
    found = re.fullmatch(r"experts_over_(\d+)", mesh.name)
    return Groups(mesh, int(found[1]) if found else mesh.size)


class Groups:
    """How the devices of a mesh share the experts, and what they tell each other.

    Args:
        mesh: A mesh of one axis.
        size: P, devices that hold all experts together. Divides those of the mesh.

    Attributes:
        size: P.
        number: G.
    """

    def __init__(self, mesh: dtensor.Mesh, size: int):
        self._mesh = mesh
        self.size, self.number = size, mesh.size // size
        if self.number == 1:
            return
        for name in _COLLECTIVES:
            os.environ[PASSED_ON + name] = "1"
        keys = compatibility.new_group_keys(self.number + size)
        # For each device the key of its group, and that of its place in any group.
        self._within = [keys[i // size] for i in range(mesh.size)]
        self._across = [keys[self.number + i % size] for i in range(mesh.size)]

    def layout(self, rank: int, axis: int = 0) -> dtensor.Layout:
        """That of a tensor whose `axis` is shared among all devices."""
        specs = [dtensor.UNSHARDED] * rank
        specs[axis] = self._mesh.dim_names[0]
        return dtensor.Layout(specs, self._mesh)

    def num_padded(self, num_experts: int) -> int:
        """Experts of one copy, with those of zeros that fill the last shard."""
        return num_experts + -num_experts % self.size

    def copies(self, flags: np.ndarray, others: bool | None = None) -> np.ndarray:
        """`(E,)` bool -> `(G * E,)`, as weights are stored; True in the padding.

        Args:
            flags: `(E,)` bool.
            others: What all copies but the first one have. None means `flags`.
                Defaults to `None`.
        """
        missing = self.num_padded(len(flags)) - len(flags)
        first = np.pad(flags, [0, missing], constant_values=True)
        rest = first if others is None else np.full_like(first, others)
        return np.concatenate([first, *[rest] * (self.number - 1)])

    def to_experts(self, rows: tf.Tensor) -> tf.Tensor:
        """Takes rows to the devices of their experts: one all-to-all.

        Args:
            rows: `(R, E, C, D)`, sharded over the first axis.

        Returns:
            `(G * E, P * C, D)`, likewise.
        """
        devices, num_experts, num_slots, width = rows.shape
        rows = dtensor.relayout(rows, self.layout(4))
        if self.number == 1:
            rows = dtensor.relayout(rows, self.layout(4, axis=1))
            rows = tf.transpose(rows, [1, 0, 2, 3])
            return tf.reshape(rows, [num_experts, devices * num_slots, width])
        own = num_experts // self.size
        rows = self._exchanged(rows, [own, num_slots, width])
        rows = tf.transpose(rows, [0, 2, 1, 3, 4])  # (R, E / P, P, C, D)
        return tf.reshape(rows, [devices * own, self.size * num_slots, width])

    def to_tokens(self, rows: tf.Tensor) -> tf.Tensor:
        """Takes rows back to where they came from: one all-to-all.

        Args:
            rows: `(G * E, P * C, D)`, sharded over the first axis.

        Returns:
            `(R, E, C, D)`, likewise.
        """
        width = rows.shape[-1]
        num_slots = rows.shape[1] // self.size
        if self.number == 1:
            rows = tf.reshape(rows, [rows.shape[0], self.size, num_slots, width])
            rows = tf.transpose(rows, [1, 0, 2, 3])
            rows = dtensor.relayout(rows, self.layout(4, axis=1))
            return dtensor.relayout(rows, self.layout(4))
        devices, own = self._mesh.size, rows.shape[0] // self._mesh.size
        rows = tf.reshape(rows, [devices, own, self.size, num_slots, width])
        rows = tf.transpose(rows, [0, 2, 1, 3, 4])  # (R, P, E / P, C, D)
        rows = self._exchanged(rows, [own, num_slots, width])
        return tf.reshape(rows, [devices, self.size * own, num_slots, width])

    def _exchanged(self, rows, block):
        """Block j of a device goes to device j of its group, `(R, P, *block)`."""
        devices = self._mesh.size
        if self.size == 1:
            return tf.reshape(rows, [devices, 1, *block])
        # Step by step: DTensor sees that every device keeps its rows.
        rows = tf.reshape(rows, [devices, self.size, *block])
        rows = tf.reshape(rows, [devices * self.size, *block])
        rows = self._by_each(tf.raw_ops.CollectiveAllToAllV2, rows, self._within)
        return tf.reshape(rows, [devices, self.size, *block])

    def sum_of_copies(self, value: tf.Tensor) -> tf.Tensor:
        """Adds up the copies of an array, and gives each of them the sum.

        Args:
            value: `(G * E, ...)`, sharded over the first axis.

        Returns:
            Likewise; the devices at one place in their groups have the same.
        """
        if self.number == 1:
            return value
        add = functools.partial(
            tf.raw_ops.CollectiveReduceV2, merge_op="Add", final_op="Id"
        )
        return self._by_each(add, value, self._across)

    def _by_each(
        self, collective: Callable, value: tf.Tensor, keys: Sequence[int]
    ) -> tf.Tensor:
        """A collective that every device runs with those that have its key."""
        layout = self.layout(value.shape.rank)
        value = dtensor.relayout(value, layout)
        value = dtensor.relayout(value, layout.to_parted())
        key = dtensor.relayout(tf.constant(keys, tf.int32), self.layout(1))
        key = dtensor.relayout(key, self.layout(1).to_parted())
        done = collective(
            input=value,
            group_size=tf.constant(keys.count(keys[0])),
            group_key=tf.reduce_sum(key),  # of the one that is here
            instance_key=tf.constant(next(_instance_keys)),
            ordering_token=[],
        )
        return dtensor.relayout(done, layout)
