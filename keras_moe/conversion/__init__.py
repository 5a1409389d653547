"""Dense models made sparse, and back; published weights."""

from keras_moe.conversion.fewer_experts import merge_experts, prune_experts
from keras_moe.conversion.published import load_mixtral, load_switch
from keras_moe.conversion.upcycling import upcycle

__all__ = ["load_mixtral", "load_switch", "merge_experts", "prune_experts", "upcycle"]
