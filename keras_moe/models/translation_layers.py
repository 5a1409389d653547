"""What stands between the LSTMs of the translation models."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import checks
from keras_moe.models.middle import (
    GATINGS,
    make_mixture,
    single_expert,
    verify_levels,
)

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
    noise: Any = "learned",
    activation: Any = "sigmoid",
    shared_units: int = 0,
    expert_dropout: float = 0.0,
    scaling_factor: float = 1.0,
    name: str = "moe",
) -> list[keras.layers.Layer]:
    """Layers for one side of `MoETranslator`, mixture or dense baseline.

    With the strictly balanced gate the load is equal by construction and has no
    gradient, so the load loss is left out. In a hierarchical mixture that gate
    is the primary one, and noisy top-k gates choose within the groups.

    Args:
        kind: `"moe"`; `"moe_1_wide"`, one expert with a hidden layer of the
            product of `k` times `hidden_units`, and `shared_units` more, for equal
            operations; or
            `"none"`.
        units: Int. Width of the model.
        hidden_units: Int. Hidden units of one expert.
        num_experts: Int. Number of experts.
        k: `(k,)`, or `(groups, experts in each)` with `num_groups`. Defaults to
            `(4,)`.
        num_groups: Int or None. Groups of a hierarchical mixture. Defaults to
            `None`: flat.
        gating: See `make_mixture`. Defaults to `"noisy_top_k"`.
        loss_weight: Float. Weight of the importance loss, and of the load loss where
            the load has a gradient. Defaults to `0.01`.
        noise: `noise_stddev` of noisy gates. Defaults to `"learned"`.
        activation: Activation of the output of a mixture, or of one expert.
            Defaults to `"sigmoid"`.
        shared_units: Int. Hidden units of an expert that every token passes, see
            `make_mixture`. Defaults to `0`.
        expert_dropout: Float. Share of the hidden units of every expert, or of the
            one, that is dropped in training. Defaults to `0.0`.
        scaling_factor: Float. Factor of all gates, see `make_mixture`. Defaults to
            `1.0`.
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
        hidden = product * hidden_units + shared_units
        return [single_expert(hidden, name, activation, expert_dropout)]
    return [
        make_mixture(
            hidden_units,
            num_experts,
            k,
            num_groups=num_groups,
            gating=gating,
            loss_weight=loss_weight,
            noise=noise,
            activation=activation,
            shared_units=shared_units,
            units=units,
            expert_dropout=expert_dropout,
            scaling_factor=scaling_factor,
            name=name,
        )
    ]
