"""A mixture of another number of experts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_moe import checks
from keras_moe.conversion.rebuilding import array_of, rebuild
from keras_moe.layers.base_experts import Experts
from keras_moe.layers.expert_choice_gating import ExpertChoiceGating
from keras_moe.layers.expert_list import ExpertList
from keras_moe.layers.gating import k_of
from keras_moe.layers.hierarchical_gating import HierarchicalGating
from keras_moe.layers.moe import MoE


class _Made(NamedTuple):
    """A part that was made, of which experts, and for which mixture first."""

    part: Any
    weights: np.ndarray | None
    label: str


class Parts:
    """Parts of the new mixtures, one for each of before, as mixtures may share them."""

    def __init__(self):
        self._made: dict[int, _Made] = {}

    def of(self, label, part, weights, make):
        """What stands for a part, the same for every mixture that holds it.

        Args:
            label: What the mixture is called in messages.
            part: Of the mixture of before.
            weights: `(new, E)`, how much of each expert is in a new one; None for a
                part that has no experts.
            make: Gives the new part, the first time.

        Raises:
            ValueError: It was made of other experts.
        """
        if id(part) not in self._made:
            self._made[id(part)] = _Made(make(), weights, label)
        made = self._made[id(part)]
        if weights is not None and not np.array_equal(made.weights, weights):
            raise ValueError(
                "Mixtures that share experts or a gate must be left with the same "
                f"experts. Received: others for {label!r} than for {made.label!r}, which "
                f"share {part.name!r}. Pass the same indices for both."
            )
        return made.part


def resized(
    label: str,
    layer: MoE,
    weights: np.ndarray,
    k: Any,
    parts: Parts,
    kept: Sequence[int] = (),
) -> MoE:
    """A built mixture whose experts are sums of those of another.

    Args:
        label: What the other is called in messages.
        layer: The other.
        weights: `(new, E)`, how much of each is in a new one.
        k: Experts for each token, or None for as many as before.
        parts: Those that are made for mixtures of the same model.
        kept: Where each new expert is one of the old, which ones.

    Raises:
        ValueError: The gate does not take so many experts, or nothing is known of what
            belongs to an expert; the parts are shared with another mixture, whose
            experts are others.
    """
    gate = layer.gating
    if isinstance(gate, HierarchicalGating):
        raise ValueError(
            "`model` must have mixtures of one level. Received: "
            f"{label!r} with groups of experts. Leave it out by `layers`."
        )
    new_gate = parts.of(label, gate, weights, lambda: _smaller(label, gate, weights, k))
    experts = parts.of(
        label, layer.experts, weights, lambda: _fewer(label, layer, weights, kept)
    )
    shared = layer.shared_experts
    if shared is not None:
        shared = parts.of(
            label, shared, None, lambda: rebuild(layer.shared_experts, {})
        )
    new = type(layer)(
        **{
            **layer.get_config(),
            "experts": experts,
            "gating": new_gate,
            "shared_experts": shared,
        }
    )
    new.build(*input_shapes(layer))
    new.built = True
    if isinstance(layer.experts, Experts):
        # By name: what was added later, as by `enable_lora`, may stand elsewhere.
        stacks = {weight.name: weight for weight in layer.experts.stacked_weights}
        for weight in new.experts.stacked_weights:
            weight.assign(summed(weights, stacks[weight.name]))
    _fill_gate(gate, new_gate, weights, label)
    new.trainable = layer.trainable
    return new


def _smaller(label, gate, weights, k):
    """A gate of another number of experts, without its weights."""
    number, kind = len(weights), type(gate).__name__
    config = gate.get_config()
    takes_k = "k" in config
    if config.get("num_experts") is not None:
        config["num_experts"] = number
    if k is not None:
        if not takes_k:
            raise ValueError(
                f"`k` must be None for a gate without one, or with one of its own. "
                f"Received: k={k}, a {kind} in {label!r}. Leave it out."
            )
        config["k"] = checks.verify_positive_int(k, "k")
    elif not isinstance(gate, ExpertChoiceGating):  # its k is an average
        k = k_of(gate)
    if k is not None and k > number:
        remedy = "Pass a lower `k`, or keep more." if takes_k else "Keep more."
        raise ValueError(
            f"`k` must be at most the experts that are left. Received: k={k} of "
            f"{label!r}, {number} experts, and a {kind}. {remedy}"
        )
    try:
        return type(gate).from_config(config)
    except (TypeError, ValueError) as error:
        # Keras puts a text of its own around the gate's.
        reason = error.__context__ or error
        raise ValueError(
            f"The gate of {label!r} must take the experts that are left. Received: a "
            f"{kind}, {number} experts: {reason}"
        ) from error


def _fewer(label, layer, weights, kept):
    """Experts of another number, without their weights; of a list with them."""
    experts = layer.experts
    if isinstance(experts, ExpertList) and kept:
        return type(experts)([rebuild(experts.experts[e], {}) for e in kept])
    if not isinstance(experts, Experts):
        raise ValueError(
            "`model` must have mixtures whose experts are `Experts`, or an `ExpertList` "
            f"that is pruned. Received: a {type(experts).__name__} in {label!r}. "
            "Leave it out by `layers`."
        )
    frozen = np.isin(np.arange(experts.num_experts), experts.frozen_experts)
    # One of several that are averaged trains if any does.
    still = [int(i) for i, row in enumerate(weights) if frozen[row > 0].all()]
    config = {**experts.get_config(), "num_experts": len(weights)}
    return type(experts).from_config({**config, "frozen_experts": still})


def _fill_gate(gate, new_gate, weights, name):
    number = weights.shape[1]
    found = False
    for old_weight, weight in zip(gate.weights, new_gate.weights, strict=True):
        value = array_of(old_weight)
        if value.ndim and value.shape[-1] == number:
            found = True
            value = np.moveaxis(summed(weights, np.moveaxis(value, -1, 0)), 0, -1)
        weight.assign(value)
    if not found:
        raise ValueError(
            "`model` must have gates whose weights have the experts as their last axis. "
            f"Received: a {type(gate).__name__} in {name!r} without any, num_experts="
            f"{number}. Leave the mixture out by `layers`."
        )


def input_shapes(layer: MoE) -> list[tuple[int | None, ...]]:
    """What a mixture is built with, nothing but the features known.

    Returns:
        Shape of the inputs, and that of `gate_inputs` if it has them.
    """
    config = layer.get_build_config()
    shapes = config.get("shapes_dict") or {"inputs_shape": config["input_shape"]}
    features = [layer.input_spec.axes[-1], layer.gate_features]
    return [
        (*[None] * (len(shape) - 1), size)
        for shape, size in zip(shapes.values(), features, strict=False)
    ]


def summed(weights: np.ndarray, stack: Any) -> np.ndarray:
    """`(new, E)` times `(E, ...)`, a bit-for-bit copy where one weight is 1."""
    stack = array_of(stack)
    rows = []
    for row in weights:
        (used,) = np.nonzero(row)
        if len(used) == 1:
            rows.append(stack[used[0]])
        else:
            exact = sum(row[e] * stack[e].astype(np.float64) for e in used)
            rows.append(exact.astype(stack.dtype))
    return np.stack(rows)
