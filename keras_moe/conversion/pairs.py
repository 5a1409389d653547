"""Feed-forward pairs of a model: a hidden `Dense` and the `Dense` that it feeds."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_moe import checks
from keras_moe.conversion.tracing import Call, Trace, trace
from keras_moe.layers.moe import MoE

_RULES = (
    "kernel_regularizer",
    "bias_regularizer",
    "kernel_constraint",
    "bias_constraint",
)


class Pair(NamedTuple):
    """Two `Dense` layers that are one expert to be.

    Attributes:
        label: Name of the first, after those of the layers around it.
        first: The hidden layer.
        second: The layer that takes all that the first gives.
        between: `Activation`, `ReLU` and `Dropout` layers on the way.
        num_calls: How often the pair is called in the model.
        shape: Of its inputs in the first call, with nothing but the features known.
    """

    label: str
    first: keras.layers.Dense
    second: keras.layers.Dense
    between: tuple[keras.layers.Layer, ...]
    num_calls: int
    shape: tuple[int | None, ...]

    @property
    def activations(self) -> list[Callable]:
        """What is applied to the hidden units; more than one is no expert's."""
        given = [
            keras.activations.relu
            if isinstance(layer, keras.layers.ReLU)
            else layer.activation
            for layer in (self.first, *self.between)
            if not isinstance(layer, keras.layers.Dropout)
        ]
        return [each for each in given if each is not keras.activations.linear]

    @property
    def dropout(self) -> float:
        """Share of hidden units that the dropouts between the two drop, all in all."""
        dropouts = (x for x in self.between if isinstance(x, keras.layers.Dropout))
        return 1.0 - math.prod(1.0 - layer.rate for layer in dropouts)


def named_layers(model: keras.layers.Layer) -> Iterator[tuple[str, Any]]:
    """Layers inside a model, each with the names of those around it before its own."""

    def walk(layer, around):
        for inner in _inner(layer):
            if id(inner) not in seen:
                seen.add(id(inner))
                name = inner.name
                if isinstance(layer, keras.Sequential) and inner not in layer.layers:
                    yield from walk(inner, around)  # the graph that it runs
                    continue
                yield f"{around}{name}", inner
                yield from walk(inner, f"{around}{name}/")

    seen: set[int] = set()
    yield from walk(model, "")


def matches(label: str, layer: Any, wanted: Any) -> bool:
    """Whether a layer is one of those asked for.

    Args:
        label: Of `named_layers`.
        layer: The layer.
        wanted: Names of layers, by themselves or with those around them; or a
            function of the layer; None takes all.
    """
    if wanted is None:
        return True
    if callable(wanted):
        return bool(wanted(layer))
    return any(label == name or label.endswith(f"/{name}") for name in wanted)


def chosen(
    found: Sequence[tuple[str, Any]], wanted: Any, what: str, others: dict[str, str]
) -> list[Any]:
    """Those asked for, or an error that says what there is.

    Args:
        found: Label and layer of each.
        wanted: As for `matches`.
        what: What they are called in the message.
        others: Label and reason of what else could have been meant.

    Returns:
        Labels.

    Raises:
        ValueError: A name stands for none; there is none.
    """
    if isinstance(wanted, str):
        wanted = [wanted]
    if wanted is not None and not callable(wanted):
        wanted = checks.verify_texts(wanted, "layers") if np.ndim(wanted) else [wanted]
        for name in wanted:
            if not any(matches(label, layer, [name]) for label, layer in found):
                why = [
                    reason
                    for label, reason in others.items()
                    if matches(label, None, [name])
                ]
                raise ValueError(
                    f"`layers` must name {what}. Received: {name!r}"
                    f"{', ' + why[0] if why else ''}. {_listed(found, others)}"
                )
    labels = [label for label, layer in found if matches(label, layer, wanted)]
    if not labels:
        raise ValueError(
            f"`layers` must leave {what}. Received: layers={wanted!r}, a model in which "
            f"none is found. {_listed(found, others)}"
        )
    return labels


def _listed(found, others):
    names = [repr(label) for label, _ in found]
    reasons = [f"{label!r} {reason}." for label, reason in others.items()]
    listed = ", ".join(_first(names, 16)) or "none"
    return " ".join([f"There are: {listed}.", *_first(reasons, 4)])


def _first(texts, number):
    more = len(texts) - number
    return [*texts[:number], *([f"and {more} more"] if more > 0 else [])]


def find_pairs(model: Any, inputs: Any) -> tuple[list[Pair], dict[str, str]]:
    """All pairs of a model, of which some may overlap.

    Args:
        model: A built model or layer.
        inputs: Specs of its inputs.

    Returns:
        pairs: List of `Pair`.
        others: Why other `Dense` layers begin none, by label.
    """
    named = list(named_layers(model))
    mixtures = tuple(f"{label}/" for label, layer in named if isinstance(layer, MoE))
    # What stands inside of a mixture already stays.
    named = [(label, x) for label, x in named if not label.startswith(mixtures)]
    # Also those that may not stand in a pair: in inference they may pass on their
    # input as it is, as noise does.
    alone = [layer for _, layer in named if not _inner(layer)]
    seen = trace(model, inputs, alone)
    pairs, others = [], {}
    for label, layer in named:
        if type(layer) is keras.layers.Dense:
            pair, reason = _pair_of(label, layer, seen)
            if pair is None:
                others[label] = reason
            else:
                pairs.append(pair)
    return pairs, others


def without_overlap(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs in their order, without those that share a layer with one before."""
    taken: set[int] = set()
    kept = []
    for pair in pairs:
        own = {id(pair.first), id(pair.second), *map(id, pair.between)}
        if not own & taken:
            taken |= own
            kept.append(pair)
    return kept


def _inner(layer):
    return layer._flatten_layers(recursive=False, include_self=False)


def _is_of_pairs(layer):
    if isinstance(layer, keras.layers.Dropout):
        return getattr(layer, "noise_shape", None) is None
    if type(layer) is keras.layers.ReLU:
        simple = layer.max_value is None and not layer.threshold
        return simple and not layer.negative_slope
    return type(layer) in (keras.layers.Dense, keras.layers.Activation)


def _pair_of(label, first, seen: Trace):
    """The pair that a layer begins, or None and why."""
    if reason := _not_plain(first):
        return None, reason
    ways = [_way_from(call, seen) for call in seen.of(first)]
    if not ways:
        return None, "is not called in inference"
    if any(way is None for way in ways):
        return None, (
            "does not feed one Dense layer alone, directly or through Activation, ReLU "
            "or Dropout layers"
        )
    way = ways[0]
    if any(list(map(id, other)) != list(map(id, way)) for other in ways):
        return None, "feeds different layers in different calls"
    *between, second = way
    for layer in way:
        if len(seen.of(layer)) != len(ways):
            return None, f"feeds {layer.name!r}, which others feed too"
    rank = seen.of(first)[0].inputs.shape.rank
    shape = (*[None] * (rank - 1), first.kernel.shape[0])
    pair = Pair(label, first, second, tuple(between), len(ways), shape)
    reason = _no_expert(pair)
    return (None, reason) if reason else (pair, "")


def _way_from(call: Call, seen: Trace):
    """Layers that take the output of a call, up to the next `Dense`, or None."""
    way: list[Any] = []
    following: Call | None = call
    while following is not None:
        following = seen.next_after(following.outputs, following)
        if following is not None:
            if not _is_of_pairs(following.layer):
                return None
            way.append(following.layer)
            if type(following.layer) is keras.layers.Dense:
                return way
    return None


def _no_expert(pair: Pair) -> str:
    """Why a pair cannot be an expert; empty if it can."""
    first, second = pair.first, pair.second
    if len(pair.activations) > 1:
        return f"has two activations before {second.name!r}"
    if reason := _not_plain(second):
        return reason
    if first.dtype_policy.name != second.dtype_policy.name:
        return f"has another dtype policy than {second.name!r}"
    for rule in _RULES:
        if not rule.startswith("bias") or (first.use_bias and second.use_bias):
            one, other = (
                keras.saving.serialize_keras_object(getattr(layer, rule))
                for layer in (first, second)
            )
            if one != other:
                return f"has another {rule} than {second.name!r}"
    return ""


def _not_plain(layer) -> str:
    """Why a `Dense` layer is more than a product; empty if it is not."""
    if getattr(layer, "lora_enabled", False):
        return f"has LoRA weights in {layer.name!r}"
    if getattr(layer, "quantization_mode", None):
        return f"has quantized weights in {layer.name!r}"
    if layer.activity_regularizer is not None:
        return f"has an activity regularizer in {layer.name!r}"
    return ""


def rules_of(pair: Pair) -> dict[str, Any]:
    """Regularizers and constraints, as arguments of `FeedForwardExperts`."""
    biased = pair.first if pair.first.use_bias else pair.second
    return {
        rule: getattr(biased if rule.startswith("bias") else pair.first, rule)
        for rule in _RULES
    }
