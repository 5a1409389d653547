"""Checks of the parts of a transformer block."""

import keras

from keras_moe import checks
from keras_moe.layers.moe import MoE


def verify_attention(attention, num_key_value_heads, max_wavelength) -> int | None:
    """The heads of the attention that a block is to make, None if it is given one."""
    if not isinstance(attention, keras.layers.Layer):
        return checks.verify_positive_int(attention, "attention")
    if (num_key_value_heads, max_wavelength) != (None, None):
        raise ValueError(
            "`num_key_value_heads` and `max_wavelength` must be None where `attention` "
            f"is a layer, which has its own. Received: {num_key_value_heads}, "
            f"{max_wavelength}. Give them to the layer."
        )
    return None


def verify_mixture(moe, feed_forward, causal):
    if moe is None:
        return
    if not isinstance(moe, MoE):
        raise ValueError(
            "`moe` must be a MoE or HierarchicalMoE. Received: "
            f"moe={moe!r}. Pass another network as `feed_forward`."
        )
    if feed_forward is not None:
        raise ValueError(
            "Of `moe` and `feed_forward` only one may be given. Received: "
            f"moe={moe.name!r}, feed_forward={feed_forward!r}. Leave one out."
        )
    gates = [moe.gating, getattr(moe.gating, "primary_gating", None)]
    for gate in gates:
        if causal and getattr(gate, "sees_other_tokens", False):
            raise ValueError(
                "`moe` of a causal block must have a gate that decides for each token "
                f"by itself. Received: a {type(gate).__name__}, which compares tokens, "
                "so that later ones change what earlier ones get. Use TopKGating, or "
                "causal=False."
            )


def verify_width(layer, features):
    width = layer.compute_output_shape((None, None, features))[-1]
    if width != features:
        raise ValueError(
            f"{layer.name!r} must give as many features as it takes, for the residual. "
            f"Received: {width} features of {features}. Leave out `output_units`."
        )
