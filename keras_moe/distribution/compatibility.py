"""Everything taken from inside TensorFlow and Keras, in one place.

Checked with TensorFlow 2.20.0 and Keras 3.15.1; `requirements` lets no other minor
version come here. `tests/distribution` fails where one of these no longer works.
"""

import contextlib
import copy
import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from keras.src.backend.common.name_scope import name_scope
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.tensorflow import numpy as keras_numpy
from keras.src.backend.tensorflow import random as keras_random
from keras.src.backend.tensorflow import trainer as trainer_module
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.losses import loss as loss_module
from keras.src.optimizers.base_optimizer import BaseOptimizer
from tensorflow.dtensor.python import accelerator_util
from tensorflow.dtensor.python import api as dtensor_api
from tensorflow.python.data.ops import multi_device_iterator_ops as device_iterators
from tensorflow.python.distribute import distribute_lib, values_util
from tensorflow.python.distribute.cross_device_ops import CollectiveAllReduce
from tensorflow.python.distribute.cross_device_utils import INSTANCE_KEY_START_NUMBER
from tensorflow.python.distribute.distribute_lib import ReplicaContext, UpdateContext
from tensorflow.python.distribute.values import SyncOnReadVariable
from tensorflow.python.eager import record
from tensorflow.python.ops import array_ops, collective_ops
from tensorflow.python.ops import gen_array_ops as raw_array
from tensorflow.python.ops import gen_nn_ops as raw_nn
from tensorflow.python.ops.control_flow_v2_func_graphs import (
    WhileBodyFuncGraph,
    WhileCondFuncGraph,
)
from tensorflow.python.ops.resource_variable_ops import ResourceVariable

__all__ = [
    "BaseOptimizer",
    "ReplicaContext",
    "ResourceVariable",
    "SyncOnReadVariable",
    "TFOptimizer",
    "TensorFlowTrainer",
    "UpdateContext",
    "all_gather",
    "all_reduce",
    "all_reduce_among",
    "all_reduce_gradients",
    "all_to_all",
    "collective_ops_of",
    "component_devices",
    "device_iterators",
    "dtensor_is_initialized",
    "in_stateless_scope",
    "is_in_loop",
    "is_recording",
    "keras_numpy",
    "keras_random",
    "layer_name_scope",
    "local_replica",
    "loss_module",
    "moves_in_steps",
    "new_group_keys",
    "operation_modules",
    "raw_array",
    "raw_nn",
    "replica_here",
    "replica_or_none",
    "separate_collectives",
    "split_collectives",
    "start_dtensor_device",
    "track_weight",
    "trainer_module",
]

# Where the functions of single operations are named, besides `tf` itself.
operation_modules = (raw_array, raw_nn, array_ops)


def collective_ops_of(strategy: Any) -> Any:
    """What launches the collectives of a strategy; None if it has none."""
    extended = strategy.extended
    for name in ("_collective_ops", "_cross_device_ops"):
        found = getattr(extended, name, None)
        if isinstance(found, CollectiveAllReduce):
            return found
    return None


# Far above the keys that TensorFlow gives, 1 for each strategy.
_group_keys = itertools.count(2**20)


def new_group_keys(number: int) -> list[int]:
    """Keys of groups of devices that nothing else in this process has."""
    return [next(_group_keys) for _ in range(number)]


def separate_collectives(strategy: Any) -> None:
    """Keeps the collectives of a strategy apart from those of others in the process.

    TensorFlow numbers them from the same start for every strategy, and refuses a
    number that it has seen with another shape: a second model with a strategy of its
    own could not be trained.
    """
    if not isinstance(strategy, tf.distribute.MirroredStrategy):
        return  # processes have to agree on the number
    operations = collective_ops_of(strategy)
    keys = operations._collective_keys
    stock, keys._group_key = keys._group_key, new_group_keys(1)[0]
    group = keys._get_new_group_key(operations._devices)
    keys._group_key = stock
    for launcher in operations._launchers:
        launcher._group_key = group


# For processes, which have to agree: the same numbers in all of them.
_FIRST_KEY_OF_PROCESSES = 2**24

# Of a strategy: for each name of a partition the launcher of each replica here.
_partitions: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def split_collectives(
    strategy: Any, partitions: dict[str, Sequence[Sequence[int]]]
) -> None:
    """Makes collectives among parts of the replicas possible.

    Args:
        strategy: A mirrored strategy; once, and the same in all processes.
        partitions: By name, as which `among` of the collectives knows it: groups of
            one size that each replica is in one of, in ascending order.
    """
    operations = collective_ops_of(strategy)
    table = operations._collective_keys._instance_key_table
    numbers = _group_keys
    if not isinstance(strategy, tf.distribute.MirroredStrategy):
        numbers = itertools.count(_FIRST_KEY_OF_PROCESSES)
    replicas = [replica for replica, _ in component_devices(strategy)]
    found = _partitions.setdefault(strategy, {})
    for name, groups in partitions.items():
        keys: dict[int, int] = {}
        for members in groups:
            keys |= dict.fromkeys(members, next(numbers))
        found[name] = []
        for replica, stock in zip(replicas, operations._launchers, strict=True):
            # With the token that puts all collectives of a device in one order.
            launcher = copy.copy(stock)
            launcher._group_key, launcher._group_size = keys[replica], len(groups[0])
            of_device = table.setdefault(launcher._group_key, {})
            of_device[launcher._device] = INSTANCE_KEY_START_NUMBER
            found[name].append(launcher)


def component_devices(strategy: Any) -> list[tuple[int, str]]:
    """Replica and device of each component that a variable has in this process."""
    extended = strategy.extended
    return [
        (extended._get_replica_id_in_sync_group(i), device)
        for i, device in enumerate(extended.worker_devices)
    ]


def replica_here() -> int:
    """The replica whose code runs here, among those of all processes."""
    return tf.distribute.get_replica_context()._replica_id_in_sync_group


def local_replica(strategy: Any) -> int:
    """Index, among those of this process, of the replica whose code runs here."""
    return strategy.extended._get_local_replica_id(replica_here())


def replica_or_none(strategy: Any) -> int | None:
    """As `local_replica`, also inside `extended.update`; None between replicas."""
    with distribute_lib.enter_or_assert_strategy(strategy):
        return values_util.get_current_replica_id_as_int()


@contextlib.contextmanager
def layer_name_scope(layer: Any):
    """The scope in which `layer.add_weight` names its weights."""
    with name_scope(layer.name, caller=layer):
        yield


def track_weight(owner: Any, variable: Any) -> Any:
    """Makes a variable one of a layer or an optimizer, as `add_weight` does."""
    owner._track_variable(variable)
    return variable


def _launcher(strategy, among=None):
    if among is None:
        launchers = collective_ops_of(strategy)._launchers
    else:
        launchers = _partitions[strategy][among]
    return launchers[local_replica(strategy)]


def all_reduce(strategy: Any, value: tf.Tensor) -> tf.Tensor:
    """Sum over the replicas, without switching the replicas' threads."""
    return _launcher(strategy).all_reduce(value)


def all_gather(strategy: Any, value: tf.Tensor, among: str | None = None) -> tf.Tensor:
    """`(n, ...)` of every replica, of one shape, -> `(R * n, ...)`.

    Args:
        strategy: The strategy.
        value: Of this replica.
        among: A name of `split_collectives`: of the replicas of this one's group
            only. Defaults to `None`, all.
    """
    return _launcher(strategy, among)._all_gather(value, None)


def all_to_all(strategy: Any, blocks: tf.Tensor, among: str | None = None) -> tf.Tensor:
    """`(R, ...)`: block r goes to replica r, and its block comes back.

    Args:
        strategy: The strategy.
        blocks: One for each replica.
        among: As for `all_gather`. Defaults to `None`.
    """
    launcher = _launcher(strategy, among)
    options = launcher._options
    key = launcher._next_instance_key()
    token = launcher._get_ordering_token()
    with tf.device(launcher._device):
        return collective_ops.all_to_all_v2(
            blocks,
            launcher._group_size,
            launcher._group_key,
            key,
            communication_hint=options.implementation.value,
            timeout=options.timeout_seconds,
            ordering_token=token,
        )


def all_reduce_among(strategy: Any, values: list, among: str) -> list:
    """Sums over a part of the replicas, by one exchange for each type.

    Args:
        strategy: The strategy.
        values: Tensors.
        among: As for `all_gather`.
    """
    launcher = _launcher(strategy, among)
    sums = _by_type(values, lambda pack: launcher.batch_all_reduce([pack]))
    return [
        tf.ensure_shape(total, value.shape)
        for total, value in zip(sums, values, strict=True)
    ]


def all_reduce_gradients(strategy: Any, gradients: list) -> list:
    """Sums gradients over the replicas; `tf.IndexedSlices` stay such."""
    operations = collective_ops_of(strategy)

    def reduce(pack):
        return operations._all_reduce(
            tf.distribute.ReduceOp.SUM,
            pack,
            local_replica(strategy),
            tf.distribute.experimental.CommunicationOptions(),
        )

    return _by_type(gradients, reduce)


def _by_type(values, function):
    """What a function makes of all values of a type, for each type."""
    found: list = [None] * len(values)
    for dtype in dict.fromkeys(value.dtype for value in values):
        places = [i for i, value in enumerate(values) if value.dtype == dtype]
        answers = function([values[i] for i in places])
        for i, answer in zip(places, answers, strict=True):
            found[i] = answer
    return found


def start_dtensor_device() -> None:
    """Makes DTensor's device in synchronous mode, if there is none yet.

    By default DTensor makes it on first use, in a mode in which failing operations
    do not raise.
    """
    if dtensor_api._dtensor_singleton is None:
        dtensor_api.reset_dtensor_device(is_async=False)


def is_in_loop() -> bool:
    """Whether a loop is traced here that the code of a single replica runs."""
    # Not one around all replicas, of a training loop.
    outermost = getattr(threading.current_thread(), "graph", None)
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph is not outermost:
        if isinstance(graph, (WhileBodyFuncGraph, WhileCondFuncGraph)):
            return outermost is not None
        graph = getattr(graph, "outer_graph", None)
    return False


def moves_in_steps(layer: Any) -> bool:
    """Whether a gate within a recurrent layer draws or counts in every step."""
    return any(
        getattr(each, "moves_in_steps", False) for each in layer._flatten_layers()
    )


def is_recording() -> bool:
    """Whether a `tf.GradientTape` is open here."""
    return record.could_possibly_record()


def dtensor_is_initialized() -> bool:
    """Whether the clients of DTensor have found each other."""
    return accelerator_util.is_initialized()
