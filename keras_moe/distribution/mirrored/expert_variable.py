"""Variables of which every replica holds only its own experts, or words."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe.distribution import compatibility
from keras_moe.distribution.topology import Shards

# Initializers of which a part looks like the whole: no need to make the whole.
_CONSTANT = (
    keras.initializers.Zeros,
    keras.initializers.Ones,
    keras.initializers.Constant,
)

# Partitions of the replicas, for `compatibility.split_collectives`: the groups that
# hold all experts, and the replicas that hold the same experts.
GROUP, HOLDERS = "group", "holders"


def among_group(shards: Shards) -> str | None:
    """The `among` of collectives within an expert-parallel group."""
    return None if shards.num_groups == 1 else GROUP


class ShardedVariable(compatibility.SyncOnReadVariable):
    """A distributed `tf.Variable` whose components are parts of one array.

    The components have different numbers of experts. A replica reads and writes
    its own; between replicas (in Python, in callbacks, when saving) it reads
    and writes as the whole array.

    Args:
        strategy: The `tf.distribute.Strategy`.
        values: The components of this process, in the order of its replicas.
        shards: `Shards` of the experts.
        axis: That of the experts. Defaults to 0.
    """

    def __init__(self, strategy: Any, values: list, shards: Shards, axis: int = 0):
        super().__init__(strategy, values, tf.VariableAggregation.NONE)
        self.shards = shards
        self.axis = axis
        self._gather: Any = None
        # Components here that hold all experts; None if one process has no such ones.
        # Processes have equal numbers of devices.
        self._whole: list | None = None
        size, first = len(values), compatibility.component_devices(strategy)[0][0]
        firsts = range(0, shards.num_replicas, size)
        groups = {i: shards.whole_group_in(range(i, i + size)) for i in firsts}
        if None not in groups.values():
            self._whole = [values[member - first] for member in groups[first] or ()]

    @property
    def shape(self) -> tf.TensorShape:
        """Shape of the part within a replica, of the whole elsewhere."""
        replica = compatibility.replica_or_none(self._distribute_strategy)
        if replica is not None:
            return self._values[replica].shape
        sizes = self._values[0].shape.as_list()
        sizes[self.axis] = self.shards.num_experts
        return tf.TensorShape(sizes)

    def assign(self, value, use_locking=False, name=None, read_value=True):
        strategy = self._distribute_strategy
        if compatibility.replica_or_none(strategy) is not None:
            return super().assign(value, use_locking, name, read_value)
        for (replica, device), part in zip(
            compatibility.component_devices(strategy), self._values, strict=True
        ):
            own = self.shards.experts_of(replica)
            with tf.device(device):
                part.assign(_entries(value, own, self.axis))
        return self

    def _get_cross_replica(self):
        """All experts. With several processes every process has to ask."""
        if self._whole is not None:
            with tf.device("CPU:0"):
                parts = [part.read_value() for part in self._whole]
                return tf.concat(parts, axis=self.axis)
        if not tf.executing_eagerly():
            if compatibility.in_stateless_scope():  # Keras infers shapes
                return tf.zeros(self.shape, self.dtype)
            raise ValueError(
                "Weights that live in several processes in parts can be read as "
                "a whole outside of a `tf.function` or within `strategy.run` only. "
                f"Received: a read of {self.name!r} in a graph."
            )
        if self._gather is None:  # traced once, not at every read
            self._gather = tf.function(self._gathered)
        strategy = self._distribute_strategy
        return strategy.experimental_local_results(self._gather())[0]

    def _gathered(self):
        """All experts on every replica, from those of its group."""
        strategy, shards = self._distribute_strategy, self.shards
        longest = int(shards.sizes.max())

        def gather():
            part = self._values[compatibility.local_replica(strategy)].read_value()
            part = _swapped(part, self.axis)
            rest = [[0, longest - part.shape[0]], *[[0, 0]] * (part.shape.rank - 1)]
            blocks = compatibility.all_gather(
                strategy, tf.pad(part, rest), among_group(shards)
            )
            blocks = tf.reshape(blocks, [shards.group_size, longest, *part.shape[1:]])
            filled = zip(tf.unstack(blocks), shards.sizes, strict=True)
            whole = tf.concat([block[:size] for block, size in filled], axis=0)
            return _swapped(whole, self.axis)

        return strategy.run(gather)

    def _export_to_saved_model_graph(self, *args, **kwargs):
        raise ValueError(
            "A model whose weights are sharded cannot be written as a SavedModel "
            f"as it is. Received: weight {self.name!r} on "
            f"{self.shards.num_replicas} replicas. Use "
            "keras_moe.serving.export, which writes the model of one device."
        )


def _entries(value, own, axis):
    """Of an array those of a run of entries of an axis."""
    return value[(*[slice(None)] * axis, slice(own.start, own.stop))]


def _swapped(value, axis):
    """The array with its first axis and another one exchanged."""
    order = list(range(value.shape.rank))
    order[0], order[axis] = axis, 0
    return value if axis == 0 else tf.transpose(value, order)


class ExpertVariable(keras.Variable):
    """A Keras variable `(E, ...)` of which every replica holds its experts.

    The words of a vocabulary are shared out likewise, and may be another axis.

    With several expert-parallel groups each of them holds all experts; what replicas
    write stays alike on those that hold the same.

    `numpy()`, `assign` and every file format see all experts, so they do not
    depend on the number of replicas.

    Args:
        initializer: Keras initializer of the whole array.
        shape: `(E, ...)`.
        strategy: A `tf.distribute.Strategy` with several replicas.
        shards: `Shards` of the E experts.
        axis: That of the experts. Defaults to 0.
        is_table: Whether its entries are words of a vocabulary. Defaults to `False`.
        **kwargs: Those of `keras.Variable`.

    Raises:
        ValueError: It is made within a replica.
    """

    def __init__(
        self,
        initializer: Any,
        shape: tuple,
        strategy: Any,
        shards: Shards,
        *,
        axis: int = 0,
        is_table: bool = False,
        **kwargs: Any,
    ):
        self._strategy = strategy
        self.shards = shards
        self.axis = axis
        self.is_table = is_table
        super().__init__(keras.initializers.get(initializer), shape=shape, **kwargs)

    def sharded_alike(
        self, initializer: Any, shape: tuple, **kwargs: Any
    ) -> "ExpertVariable":
        """Another variable that is sharded as this one: its state."""
        other = ExpertVariable(
            initializer, shape, self._strategy, self.shards, axis=self.axis, **kwargs
        )
        other.slot_of = self
        return other

    def _initialize_with_initializer(self, initializer):
        if not tf.distribute.in_cross_replica_context():
            raise ValueError(
                "A layer with experts or shared words must be built before "
                f"`strategy.run`, in the scope of the strategy. Received: {self.path!r} "
                "made within a replica. Call the model on a batch in `strategy.scope()` "
                "first, or use `keras.Input`."
            )
        shape, dtype, shards = tuple(self._shape), self._dtype, self.shards
        with tf.init_scope():
            whole = None
            if not isinstance(initializer, _CONSTANT):
                with tf.device("CPU:0"):
                    whole = tf.convert_to_tensor(initializer(shape, dtype=dtype))
            values = []
            for replica, device in compatibility.component_devices(self._strategy):
                own = shards.experts_of(replica)
                size = (*shape[: self.axis], len(own), *shape[self.axis + 1 :])
                with tf.device(device):
                    part = (
                        initializer(size, dtype=dtype)
                        if whole is None
                        else _entries(whole, own, self.axis)
                    )
                    values.append(
                        compatibility.ResourceVariable(
                            tf.identity(part),
                            trainable=self.trainable,
                            dtype=dtype,
                            name=f"{self.name}/replica_{replica}",
                            distribute_strategy=self._strategy,
                        )
                    )
            self._value = ShardedVariable(self._strategy, values, shards, self.axis)

    @property
    def shape(self) -> tf.TensorShape:
        """Shape of the part within a replica, of the whole elsewhere."""
        value = self._value
        return tf.TensorShape(self._shape) if value is None else value.shape

    @property
    def strategy(self) -> Any:
        """The `tf.distribute.Strategy` over whose replicas it lies."""
        return self._strategy

    @property
    def parts(self) -> list:
        """The `tf.Variable`s of this process, one for each of its replicas."""
        return list(self._value.values)

    def part_of_replica(self) -> Any:
        """The `tf.Variable` of the replica whose code runs here."""
        return self._value.values[compatibility.local_replica(self._strategy)]

    def numpy(self) -> np.ndarray:
        """All experts. With several processes every process has to ask."""
        return self._value.numpy()

    def __array__(self, dtype=None):
        return np.asarray(self.numpy(), dtype)

    def _serialize_to_tensors(self):
        return {"VARIABLE_VALUE": self._value.read_value()}

    def _restore_from_tensors(self, restored_tensors):
        self.assign(restored_tensors["VARIABLE_VALUE"])
        return self._value

    def _export_to_saved_model_graph(self, *args, **kwargs):
        return self._value._export_to_saved_model_graph(*args, **kwargs)
