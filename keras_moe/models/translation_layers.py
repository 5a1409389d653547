"""What stands between the LSTMs of the translation models."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import checks
from keras_moe.layers.balanced_gating import BalancedGating
from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.hierarchical_moe import HierarchicalMoE
from keras_moe.layers.moe import MoE
from keras_moe.layers.noisy_gating import NoisyTopKGating
from keras_moe.models.middle import middle_layers
from keras_moe.models.presets import GATINGS, verify_levels

KINDS = ("moe", "moe_1_wide", "none")


def translation_middle(
    kind: str,
    *,
    units: int,
    hidden_units: int,
    num_experts: int,
    k: Sequence[int] = (4,),
    num_groups: int | None = None,
    gating: str = "noisy_top_k",
    loss_weight: float = 0.01,
    name: str = "moe",
) -> list[keras.layers.Layer]:
    """Layers for one side of `MoETranslator`, mixture or dense baseline.

    With the strictly balanced gate the load is equal by construction and has no
    gradient, so the load loss is left out. In a hierarchical mixture that gate
    is the primary one, and noisy top-k gates choose within the groups.

    Args:
        kind: `"moe"`; `"moe_1_wide"`, one expert with a hidden layer of the
            product of `k` times `hidden_units`, for equal operations; or
            `"none"`.
        units: Int. Width of the model.
        hidden_units: Int. Hidden units of one expert.
        num_experts: Int. Number of experts.
        k: `(k,)`, or `(groups, experts in each)` with `num_groups`. Defaults to
            `(4,)`.
        num_groups: Int or None. Groups of a hierarchical mixture. Defaults to
            `None`: flat.
        gating: `"noisy_top_k"` or `"balanced"`. Defaults to `"noisy_top_k"`.
        loss_weight: Float. Weight of the importance loss and of the load loss.
            Defaults to `0.01`.
        name: Str. Name of the layer. Defaults to `"moe"`.

    Returns:
        A list of new layers.

    Raises:
        ValueError: A name is unknown, a size is out of range, or `k` does not fit
            `num_groups`.

    Reference:
        Shazeer et al. 2017, appendices E and F.
    """
    checks.verify_choice(kind, "kind", KINDS)
    checks.verify_choice(gating, "gating", GATINGS)
    k = checks.verify_units(k, "k")
    verify_levels(k, num_groups)
    if kind == "none":
        return []
    if kind == "moe_1_wide":
        product = k[0] * (k[1] if len(k) == 2 else 1)
        layers = middle_layers(
            kind, units=units, hidden_units=hidden_units, num_experts=1, k=product
        )
        config = layers[0].get_config()
        return [MoE.from_config({**config, "name": name})]
    gate = BalancedGating(k[0]) if gating == "balanced" else NoisyTopKGating(k[0])
    options: dict[str, Any] = {
        "importance_loss_weight": loss_weight,
        "load_loss_weight": 0.0 if gating == "balanced" else loss_weight,
        "activation": "sigmoid",
        "name": name,
    }
    experts = FeedForwardExperts(num_experts, hidden_units)
    if num_groups is None:
        return [MoE(experts, gate, **options)]
    return [HierarchicalMoE(experts, num_groups, k=k, primary_gating=gate, **options)]
