"""Keras layers."""

from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.gating import NoisyTopKGating, SoftmaxGating, TopKGating
from keras_moe.layers.moe import MoE
from keras_moe.layers.recurrent import ProjectedLSTMCell

__all__ = [
    "FeedForwardExperts",
    "MoE",
    "NoisyTopKGating",
    "ProjectedLSTMCell",
    "SoftmaxGating",
    "TopKGating",
]
