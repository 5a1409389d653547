"""Where experts live and how tokens travel, on several devices."""

from keras_moe import placement
from keras_moe.distribution.replicated import placement_of

placement.register(placement_of)
