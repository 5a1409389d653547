"""Where experts live and how tokens travel, on several devices."""

from keras_moe import placement
from keras_moe.distribution.description import Description, Share, describe
from keras_moe.distribution.launcher import launch
from keras_moe.distribution.replicated import placement_of

__all__ = ["Description", "Share", "describe", "launch"]

placement.register(placement_of)
