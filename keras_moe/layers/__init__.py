"""Keras layers."""

from keras_moe.layers.attention import MultiplicativeAttention
from keras_moe.layers.attention_lstm import AttentionLSTM
from keras_moe.layers.balanced_gating import BalancedGating
from keras_moe.layers.base_experts import Experts
from keras_moe.layers.cached_attention import CachedAttention
from keras_moe.layers.expert_choice_gating import ExpertChoiceGating
from keras_moe.layers.expert_list import ExpertList
from keras_moe.layers.experts import FeedForwardExperts, GatedExperts
from keras_moe.layers.gating import SoftmaxGating, TopKGating
from keras_moe.layers.gshard_gating import GShardGating
from keras_moe.layers.hierarchical_gating import HierarchicalGating
from keras_moe.layers.hierarchical_moe import HierarchicalMoE
from keras_moe.layers.loss_free_gating import LossFreeGating
from keras_moe.layers.moe import MoE
from keras_moe.layers.moe_lstm import MoELSTM
from keras_moe.layers.moe_lstm_cell import MoELSTMCell
from keras_moe.layers.multi_gate_moe import MultiGateMoE
from keras_moe.layers.noisy_gating import NoisyTopKGating
from keras_moe.layers.projected_lstm import ProjectedLSTMCell
from keras_moe.layers.sampled_softmax import SampledSoftmax
from keras_moe.layers.switch_gating import SwitchGating
from keras_moe.layers.transformer import MoETransformerBlock

__all__ = [
    "AttentionLSTM",
    "BalancedGating",
    "CachedAttention",
    "ExpertChoiceGating",
    "ExpertList",
    "Experts",
    "FeedForwardExperts",
    "GShardGating",
    "GatedExperts",
    "HierarchicalGating",
    "HierarchicalMoE",
    "LossFreeGating",
    "MoE",
    "MoELSTM",
    "MoELSTMCell",
    "MoETransformerBlock",
    "MultiGateMoE",
    "MultiplicativeAttention",
    "NoisyTopKGating",
    "ProjectedLSTMCell",
    "SampledSoftmax",
    "SoftmaxGating",
    "SwitchGating",
    "TopKGating",
]
