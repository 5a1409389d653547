"""Expert parallelism: where experts live and how tokens travel, on several devices.

Two engines: `mirrored`, for `tf.distribute` strategies of several replicas, and
`dtensor`, for DTensor layouts. Each is imported when such a strategy is first seen:
they reach inside TensorFlow and Keras, which one device does not need, and so take
fewer versions than the rest of the package (`requirements`).
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from keras_moe import checks, engine
from keras_moe.distribution.backups import Backup
from keras_moe.distribution.launcher import launch
from keras_moe.distribution.requirements import verify_versions

if TYPE_CHECKING:
    from keras_moe.distribution.description import Description, Share, describe
    from keras_moe.distribution.dtensor.mesh import create_mesh
    from keras_moe.distribution.dtensor.strategy import DTensorStrategy

__all__ = [
    "Backup",
    "DTensorStrategy",
    "Description",
    "Share",
    "create_mesh",
    "describe",
    "launch",
    "set_expert_parallel_size",
    "shard_vocabulary",
]

_HOMES = {
    "DTensorStrategy": "dtensor.strategy",
    "Description": "description",
    "Share": "description",
    "create_mesh": "dtensor.mesh",
    "describe": "description",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    verify_versions(name)
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_SUPPORTED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
)


def set_expert_parallel_size(strategy: tf.distribute.Strategy, size: int) -> None:
    """Sets how many replicas share the experts out: data x expert parallelism.

    R replicas become R / size groups of `size` that follow each other. Each group holds
    all experts and exchanges tokens within itself only; the gradients of an expert are
    summed over the replicas that hold it, one of each group. Losses and weights are
    those of one device with any size, and files do not depend on it.

    Without this call all replicas are one group. 1 is plain data parallelism: every
    replica holds all experts, and no token travels. Experts that are Keras layers
    (`ExpertList`) are shared out among all replicas whatever the size.

    Args:
        strategy: A `MirroredStrategy` or `MultiWorkerMirroredStrategy`.
        size: Int. Replicas of a group; divides the number of replicas. Call before
            layers with experts are built in the scope of the strategy, in every
            process.

    Raises:
        ValueError: `size` is below 1, does not divide the number of replicas or comes
            after experts were built for another, or the strategy is of another kind.

    Example:

    >>> strategy = tf.distribute.MirroredStrategy()
    >>> keras_moe.distribution.set_expert_parallel_size(strategy, 1)

    Reference:
        Lepikhin et al. 2020, "GShard"; Rajbhandari et al. 2022, "DeepSpeed-MoE", on
        groups smaller than the cluster.
    """
    if _is_on_mesh(strategy):
        raise ValueError(
            "`strategy` must be a MirroredStrategy or a MultiWorkerMirroredStrategy. "
            "Received: DTensorStrategy, whose groups are those of its mesh. Pass "
            f"create_mesh(..., expert_parallel_size={size!r}) to it instead."
        )
    engine_here = _engine_of(strategy)
    size = checks.verify_positive_int(size, "size")
    number = strategy.num_replicas_in_sync
    if number % size:
        raise ValueError(
            "`size` must divide the number of replicas, so that all groups of them are "
            f"equal. Received: size={size} for {number} replicas. Pass one of "
            f"{[n for n in range(1, number + 1) if number % n == 0]}."
        )
    if engine_here is not engine.ONE_DEVICE:
        engine_here.set_group_size(size)  # type: ignore[attr-defined]


def shard_vocabulary(strategy: tf.distribute.Strategy) -> None:
    """Shares the words of vocabularies out among the devices of a strategy.

    Of R devices each holds a run of V / R words: their rows of the embedding and of the
    softmax, the gradients of these and the state of the optimizer for them. Without this
    call every device has all words. Losses and weights are those of one device either
    way, and files do not depend on it.

    It is for the models of this package and for `SampledSoftmax`; layers of Keras stay
    as they are. Under a mirrored strategy the words are shared among all replicas, with any
    `set_expert_parallel_size`.

    Args:
        strategy: A `MirroredStrategy`, `MultiWorkerMirroredStrategy` or
            `DTensorStrategy`. Call before layers with a vocabulary are built in its
            scope, in every process. With one replica it does nothing.

    Raises:
        ValueError: It comes after such a layer was built, or the strategy is of another
            kind.

    Example:

    >>> strategy = tf.distribute.MirroredStrategy()
    >>> keras_moe.distribution.shard_vocabulary(strategy)

    Reference:
        Shoeybi et al. 2019, "Megatron-LM", section 3, on the softmax of a vocabulary in
        parts.
    """
    engine_here = _engine_of(strategy)
    if engine_here is not engine.ONE_DEVICE:
        engine_here.shard_vocabulary()  # type: ignore[attr-defined]


def _is_on_mesh(strategy):
    dtensor = sys.modules.get(f"{__name__}.dtensor.strategy")
    return dtensor is not None and isinstance(strategy, dtensor.DTensorStrategy)


def _engine_of(strategy: Any) -> engine.Engine:
    if _is_on_mesh(strategy):
        return strategy.engine
    kind = type(strategy).__name__
    if not isinstance(strategy, _SUPPORTED):
        raise ValueError(
            "`strategy` must be a MirroredStrategy or a MultiWorkerMirroredStrategy "
            f"for layers with experts. Received: {kind}. Build the model in the scope "
            "of one of these, or outside of any."
        )
    if strategy.num_replicas_in_sync == 1:
        return engine.ONE_DEVICE  # with any version
    verify_versions(kind)
    from keras_moe.distribution.mirrored.engine import engine_of

    return engine_of(strategy)


engine.register(_engine_of)
