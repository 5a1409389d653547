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

from keras_moe import engine
from keras_moe.distribution.launcher import launch
from keras_moe.distribution.requirements import verify_versions

if TYPE_CHECKING:
    from keras_moe.distribution.description import Description, Share, describe
    from keras_moe.distribution.dtensor.mesh import create_mesh
    from keras_moe.distribution.dtensor.strategy import DTensorStrategy

__all__ = [
    "DTensorStrategy",
    "Description",
    "Share",
    "create_mesh",
    "describe",
    "launch",
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


def _engine_of(strategy: Any) -> engine.Engine:
    dtensor = sys.modules.get(f"{__name__}.dtensor.strategy")
    if dtensor is not None and isinstance(strategy, dtensor.DTensorStrategy):
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
