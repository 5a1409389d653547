"""What a mixture asks of its gate: the default one, its losses, its result."""

import inspect
import warnings
from typing import Any

import keras

from keras_moe import checks
from keras_moe.layers.gating import NoisyTopKGating, k_of
from keras_moe.types import CountedStatistics, GateStatistics, GatingResult

_DEFAULT_LOAD_LOSS_WEIGHT = 0.1


def default_gating(num_experts: int, dtype: Any) -> NoisyTopKGating:
    """The gate of a mixture to which none is given.

    Args:
        num_experts: Int.
        dtype: Policy of the mixture.

    Returns:
        A `NoisyTopKGating` of 4 experts a token, of one expert less than there are
        if there are fewer than 5. One of two experts is picked with
        `normalization="all"`, or the gate would learn nothing from the task.
    """
    k = max(1, min(4, num_experts - 1))
    normalization = "all" if k == 1 < num_experts else "selected"
    return NoisyTopKGating(k, normalization=normalization, dtype=dtype)


def set_loss_weights(layer: Any, importance: Any, load: Any) -> None:
    """Sets `importance_loss_weight`, `load_loss_weight` of a layer with a `gating`.

    A load loss of None is 0.1 where the load is smooth: a count has no gradient.

    Raises:
        ValueError: A weight is negative or not finite.
    """
    layer.importance_loss_weight = checks.verify_weight(
        importance, "importance_loss_weight"
    )
    layer.load_loss_is_asked_for = load is not None
    if load is None:
        load = _DEFAULT_LOAD_LOSS_WEIGHT if _smooth(layer.gating) is not False else 0.0
    layer.load_loss_weight = checks.verify_weight(load, "load_loss_weight")


def loss_weights_config(layer: Any) -> dict[str, Any]:
    """What `get_config` says of the weights, so that a default stays one."""
    asked = layer.load_loss_is_asked_for
    return {
        "importance_loss_weight": layer.importance_loss_weight,
        "load_loss_weight": layer.load_loss_weight if asked else None,
    }


def has_load_loss(layer: Any, statistics: GateStatistics) -> bool:
    """Whether a call of the layer adds a load loss.

    A gate that does not say whether its load is smooth is known by its statistics.
    """
    if layer.load_loss_is_asked_for or not layer.load_loss_weight:
        return bool(layer.load_loss_weight)
    smooth = _smooth(layer.gating)
    return not isinstance(statistics, CountedStatistics) if smooth is None else smooth


def _smooth(gating):
    """Whether its load is smooth in training; None where the gate does not say."""
    return getattr(gating, "has_smooth_load", None)


def warn_of_constant_gates(layer: Any) -> None:
    """Warns of gates that the task cannot teach.

    Args:
        layer: Has a `name` and a `gating`.
    """
    for choice in getattr(layer.gating, "choices", list)():
        if choice.k == 1 < choice.num_choices and choice.normalization == "selected":
            warnings.warn(
                f"{layer.name}: with k=1 of {choice.of}={choice.num_choices} and "
                'normalization="selected", every gate is constantly 1 and the task '
                f"gives {choice.gate} no gradient. Use {choice.remedy} or k >= 2.",
                stacklevel=4,
            )


def warn_of_flat_load(layer: Any) -> None:
    """Warns of a load loss without gradient.

    Args:
        layer: Has `name`, `num_experts`, `gating` and the weights of its losses.
    """
    gating, num_experts = layer.gating, layer.num_experts
    if _smooth(gating) is not False:
        return
    noisy = isinstance(gating, NoisyTopKGating)
    if noisy and 1 < gating.k == num_experts and _load_weight(layer):
        warnings.warn(
            f"{layer.name}: with k={gating.k} of num_experts={num_experts} every "
            "expert takes every token, so there is no load to balance and the load "
            f"loss (load_loss_weight={_load_weight(layer)}) is constantly 0. Set it "
            "to 0, lower `k` or add experts.",
            stacklevel=4,
        )
    elif not noisy and layer.load_loss_weight and num_experts > 1:
        warnings.warn(
            f"{layer.name}: the load of {type(gating).__name__} is a count, so the "
            f"load loss (load_loss_weight={layer.load_loss_weight}) has no gradient "
            "and balances nothing. Leave it out, or use NoisyTopKGating.",
            stacklevel=4,
        )


def _load_weight(layer):
    """Also where a default was left out: a noisy gate of all experts is a mistake."""
    asked = layer.load_loss_is_asked_for
    return layer.load_loss_weight if asked else _DEFAULT_LOAD_LOSS_WEIGHT


def verify_gating(gating: Any, argument: str = "gating") -> None:
    """Raises unless a layer can be called as a gate."""
    if isinstance(gating, keras.layers.Layer):
        parameters = inspect.signature(gating.call).parameters
        if "mask" in parameters or any(
            p.kind is p.VAR_KEYWORD for p in parameters.values()
        ):
            return
    raise ValueError(_WANTED.format(argument, f"{argument}={gating!r}"))


def verify_gating_result(result: Any, gating: Any, argument: str = "gating") -> None:
    """Raises unless a gate has returned what a gate returns."""
    if not isinstance(result, GatingResult):
        kind = type(result).__name__
        received = f"{argument}={gating!r}, which returned a {kind}"
        raise ValueError(_WANTED.format(argument, received))


_WANTED = (
    "`{0}` must be a layer that maps (tokens, features), and the call arguments `mask` "
    "and `training`, to a keras_moe.types.GatingResult. Received: {1}. Use "
    "keras_moe.layers.NoisyTopKGating, or build the result of your own layer with "
    "keras_moe.functional.make_gating_result."
)


def share_num_experts(gating: Any, num_experts: int) -> None:
    """Tells the gate how many experts there are, if it does not say itself.

    Raises:
        ValueError: They disagree, or what is given is no gate.
    """
    verify_gating(gating)
    stated = getattr(gating, "num_experts", None)
    if stated is None:
        gating.num_experts = num_experts
    elif stated != num_experts:
        raise ValueError(
            "`gating` and `experts` must agree on `num_experts`. Received: "
            f"gating.num_experts={stated}, experts.num_experts={num_experts}. Leave it "
            "out of the gate, or make them equal; a gate cannot be shared by layers "
            "with different numbers of experts."
        )
    k = k_of(gating)
    if k is not None:
        checks.verify_k(k, num_experts)
