"""Where experts live and how tokens travel, on several devices."""

from typing import Any

from keras_moe import placement
from keras_moe.distribution.description import Description, Share, describe
from keras_moe.distribution.dtensor import DTensorStrategy
from keras_moe.distribution.dtensor_mesh import create_mesh
from keras_moe.distribution.launcher import launch
from keras_moe.distribution.replicated import placement_of

__all__ = [
    "DTensorStrategy",
    "Description",
    "Share",
    "create_mesh",
    "describe",
    "launch",
]


def _placement_of(strategy: Any) -> placement.Placement:
    if isinstance(strategy, DTensorStrategy):
        return strategy.placement
    return placement_of(strategy)


placement.register(_placement_of)
