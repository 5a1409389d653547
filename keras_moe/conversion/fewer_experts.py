"""Mixtures made smaller: experts left out, or averaged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_moe import checks
from keras_moe.conversion.blocks import blocks_of, with_network
from keras_moe.conversion.pairs import chosen, named_layers
from keras_moe.conversion.rebuilding import array_of, rebuild, verify_specs
from keras_moe.layers.base_experts import Experts
from keras_moe.layers.expert_choice_gating import ExpertChoiceGating
from keras_moe.layers.expert_list import ExpertList
from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.gating import k_of
from keras_moe.layers.hierarchical_gating import HierarchicalGating
from keras_moe.layers.moe import MoE
from keras_moe.layers.multi_gate_moe import MultiGateMoE


def prune_experts(
    model: keras.layers.Layer,
    keep: Any,
    *,
    layers: Any = None,
    usage: Any = None,
    k: int | None = None,
    inputs: Any = None,
) -> Any:
    """A new model whose mixtures have fewer experts.

    Kept are the weights of some experts and their columns of the gate. A token none of
    whose experts is left out gets the same output, exactly, if its gates depend on
    chosen logits alone (`normalization="selected"`). With `normalization="all"` gates of
    all tokens grow, as the softmax is one of fewer logits; with `ExpertChoiceGating`
    the experts that are left take more tokens. A token one of whose experts is left out
    goes to the next of those that are kept. Experts or a gate that several mixtures
    share are shared in the new model too.

    Args:
        model: A built model or layer with mixtures, or a `MoE`. It stays as it is.
        keep: Indices of the experts that are kept, in their new order; or how many:
            the most used; or a dict of these by the mixture's name.
        layers: Names of mixtures, or a function of a mixture that returns a bool. None
            takes all, or those of the dict `keep`. Defaults to `None`.
        usage: For a number in `keep`: tokens of each expert, `(num_experts,)`, or a
            dict of these by name. None takes what the mixture has counted in the last
            `evaluate` or epoch, and in any eager call of the model since. Defaults to
            `None`.
        k: Int or None. Experts for each token from now on, for gates that take a `k`;
            None leaves it. Defaults to `None`.
        inputs: Specs of the inputs of a subclassed model that does not know how it was
            built. Defaults to `None`.

    Returns:
        A new model of the same class, not compiled; of a `MoE` a `MoE`.

    Raises:
        ValueError: `keep` has no different indices of experts; fewer than `k` are left;
            nothing is known of the usage; mixtures that share experts or a gate keep
            different ones; a mixture has two levels or several gates, or experts or a
            gate of which it is not known what belongs to an expert: weights of a gate
            have the experts as their last axis.

    Example:

    >>> moe = keras_moe.layers.MoE(
    ...     keras_moe.layers.FeedForwardExperts(8, 16), keras_moe.layers.TopKGating(2)
    ... )
    >>> model = keras.Sequential([keras.Input((4,)), moe])
    >>> keras_moe.prune_experts(model, keep=[0, 2, 5]).layers[0].num_experts
    3
    """

    parts = _Parts()

    def pruned(label, layer):
        own = _own(keep, label)
        if np.ndim(own) == 0:
            most = checks.verify_int(own, "keep", 1, layer.num_experts)
            counts = _usage_of(layer, label, usage)
            # The most used; of equals the first.
            own = np.sort(np.argsort(-counts, kind="stable")[:most])
        own = _verify_indices(own, "keep", layer.num_experts)
        weights = np.eye(layer.num_experts)[own]
        return _resized(label, layer, weights, k, parts, own)

    return _with_mixtures(model, pruned, layers, keep, inputs)


def merge_experts(
    model: keras.layers.Layer,
    groups: Any = None,
    *,
    layers: Any = None,
    usage: Any = None,
    k: int | None = None,
    inputs: Any = None,
) -> Any:
    """A new model in which experts are averaged in groups, or into one dense network.

    Weights of the experts of a group, and their columns of the gate, are averaged. So
    outputs are kept where the experts of a group compute the same and have the same
    columns; all into one, where all experts compute the same and the gates sum to 1:
    this takes back `upcycle`. Of experts that have grown apart an average is a start
    for training, no more. The parts of a copy (`split` of `upcycle`) have no average.
    Mixtures of groups share what they shared; of dense networks each has its own.

    Args:
        model: A built model or layer with mixtures, or a `MoE`. It stays as it is.
        groups: Lists of indices, every expert in one of them; or a dict of such lists
            by the mixture's name. None makes one dense network of all experts, a
            `keras.Sequential` of `Dense` layers under the mixture's name. Defaults to
            `None`.
        layers: As for `prune_experts`. Defaults to `None`.
        usage: Weights of the average: tokens of each expert, `(num_experts,)`, or a dict
            of these by name. None weighs all alike. Defaults to `None`.
        k: Int or None. As for `prune_experts`. Defaults to `None`.
        inputs: As for `prune_experts`. Defaults to `None`.

    Returns:
        A new model of the same class, not compiled; of a `MoE` the layer that takes its
        place.

    Raises:
        ValueError: `groups` are no partition of the experts; there are fewer than `k`;
            a group has no usage; mixtures that share experts or a gate have different
            groups or usage; a mixture has two levels or several gates, or experts that
            are no stack of one form; for a dense network, it has other experts than
            `FeedForwardExperts`, or shared ones.

    Example:

    >>> dense = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(32, "gelu"), keras.layers.Dense(8)]
    ... )
    >>> again = keras_moe.merge_experts(keras_moe.upcycle(dense, num_experts=4, k=2))
    >>> x = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")
    >>> np.testing.assert_allclose(again(x), dense(x), atol=1e-5)
    """

    parts = _Parts()

    def merged(label, layer):
        _verify_plain(label, layer.experts)
        own = _own(groups, label)
        everything = [list(range(layer.num_experts))]
        own = everything if own is None else _verify_groups(own, layer.num_experts)
        counts = np.ones(layer.num_experts)
        if usage is not None:
            counts = _usage_of(layer, label, usage)
        weights = np.zeros((len(own), layer.num_experts))
        for row, group in zip(weights, own, strict=True):
            row[group] = counts[group]
            if not row.sum():
                raise ValueError(
                    "`usage` must not be 0 for all experts of a group. Received: "
                    f"group {group} of {label!r}. Leave `usage` out, or prune them first."
                )
            row /= row.sum()
        if _own(groups, label) is None:
            return _dense(layer, label, weights)
        return _resized(label, layer, weights, k, parts)

    return _with_mixtures(model, merged, layers, groups, inputs)


def _with_mixtures(model, change: Callable, layers, by_name, inputs):
    """The model with others in place of its mixtures, `change(label, mixture)`."""
    if not isinstance(model, keras.layers.Layer) or not model.built:
        raise ValueError(
            "`model` must be a built Keras model or layer. Received: "
            f"model={model!r}. Call it on a batch first, or load its weights."
        )
    if inputs is not None:
        verify_specs(inputs)
    if isinstance(model, MoE | MultiGateMoE):
        _verify_changeable(model.name, model, {})
        return change(model.name, model)
    found: list[tuple[str, Any]] = []
    for label, layer in named_layers(model):
        within = any(label.startswith(f"{around}/") for around, _ in found)
        if isinstance(layer, MoE | MultiGateMoE) and not within:
            found.append((label, layer))
    if layers is None and isinstance(by_name, Mapping):
        layers = list(by_name)
    labels = chosen(found, layers, "a mixture", {})
    left = {label: layer for label, layer in found if label not in labels}
    replacements = {}
    for label, layer in found:
        if label in labels:
            _verify_changeable(label, layer, left)
            replacements[id(layer)] = change(label, layer)
    for block in blocks_of(model):
        network = replacements.get(id(block.moe))
        if network is not None and not isinstance(network, MoE):
            # Its config has another argument for a dense network.
            replacements[id(block)] = with_network(block, network)
    return rebuild(model, replacements, (), inputs)


def _verify_changeable(label, layer, left):
    """Raises for a mixture whose parts others need as they are."""
    if isinstance(layer, MultiGateMoE):
        raise ValueError(
            "`model` must have mixtures of one gate each. Received: "
            f"{label!r}, a MultiGateMoE of {len(layer.gatings)} gates over the same "
            "experts. Leave it out by `layers`."
        )
    own = {id(layer.experts), id(layer.gating)}
    for other, mixture in left.items():
        gates = getattr(mixture, "gatings", None) or [mixture.gating]
        if own & {id(mixture.experts), *map(id, gates)}:
            raise ValueError(
                "`layers` must hold all of the mixtures that share experts or a gate. "
                f"Received: {label!r} without {other!r}. Add it, or leave out both."
            )


def _own(given, label):
    """What is given for one mixture: of a dict the entry of its name."""
    if not isinstance(given, Mapping):
        return given
    for name, value in given.items():
        if label == name or label.endswith(f"/{name}"):
            return value
    raise ValueError(
        f"A dict by the mixtures' names must hold each of them. Received: the keys "
        f"{sorted(given)}, without {label!r}. Add it, or leave it out of `layers`."
    )


def _usage_of(layer, label, usage):
    """`(E,)` counts of a mixture."""
    if usage is None:
        counts = array_of(layer.balance.counts()) if hasattr(layer, "balance") else 0
        if not np.any(counts):
            raise ValueError(
                f"`usage` must be given for mixtures that have counted nothing. "
                f"Received: usage=None, {label!r} without a token. Call `evaluate` "
                "first, or pass the counts."
            )
        return counts
    counts = np.asarray(_own(usage, label))
    counts = counts.astype(np.float64) if counts.dtype.kind in "iuf" else np.zeros(())
    if counts.shape != (layer.num_experts,) or not np.all(counts >= 0):
        raise ValueError(
            "`usage` must be numbers of at least 0, one for each expert. Received: "
            f"shape={counts.shape}, num_experts={layer.num_experts} of {label!r}. Pass "
            "`layer.balance.counts()`, for example."
        )
    return counts


def _verify_plain(label, experts):
    lora = getattr(experts, "lora_enabled", False)
    mode = getattr(experts, "quantization_mode", None)
    if lora or mode:
        raise ValueError(
            "`model` must have experts of plain kernels to be averaged. Received: "
            f"lora_enabled={lora}, quantization_mode={mode} of {label!r}. Merge them "
            "before `quantize`; saving and loading adds what low-rank weights learned."
        )


def _verify_indices(value, name, num_experts):
    indices = np.asarray(value)
    whole = indices.ndim == 1 and indices.dtype.kind in "iu" and len(indices)
    if (
        not whole
        or len(set(indices.tolist())) < len(indices)
        or not (0 <= indices.min() <= indices.max() < num_experts)
    ):
        raise ValueError(
            f"`{name}` must be different indices of experts, at least one, within "
            f"[0, {num_experts}). Received: {value!r}. Correct them."
        )
    return indices.tolist()


def _verify_groups(value, num_experts):
    groups = list(value) if isinstance(value, Iterable) else [value]
    flat = [
        e for group in groups for e in _verify_indices(group, "groups", num_experts)
    ]
    if sorted(flat) != list(range(num_experts)):
        raise ValueError(
            f"`groups` must hold every one of {num_experts} experts once. Received: "
            f"{value!r}. Add the missing ones as groups of their own."
        )
    return [list(group) for group in groups]


class _Made(NamedTuple):
    """A part that was made, of which experts, and for which mixture first."""

    part: Any
    weights: np.ndarray | None
    label: str


class _Parts:
    """Parts of the new mixtures, one for each of before, as mixtures may share them."""

    def __init__(self):
        self._made: dict[int, _Made] = {}

    def of(self, label, part, weights, make):
        """What `make()` gives for a part, the first time that it is asked for."""
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


def _resized(
    label: str,
    layer: MoE,
    weights: np.ndarray,
    k: Any,
    parts: _Parts,
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
    shape = _input_shape(layer)
    shapes = [shape]
    if layer.gate_features != shape[-1]:
        shapes.append((*shape[:-1], layer.gate_features))
    new.build(*shapes)
    new.built = True
    if isinstance(layer.experts, Experts):
        # By name: what was added later, as by `enable_lora`, may stand elsewhere.
        stacks = {weight.name: weight for weight in layer.experts.stacked_weights}
        for weight in new.experts.stacked_weights:
            weight.assign(_summed(weights, stacks[weight.name]))
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
            value = np.moveaxis(_summed(weights, np.moveaxis(value, -1, 0)), 0, -1)
        weight.assign(value)
    if not found:
        raise ValueError(
            "`model` must have gates whose weights have the experts as their last axis. "
            f"Received: a {type(gate).__name__} in {name!r} without any, num_experts="
            f"{number}. Leave the mixture out by `layers`."
        )


def _input_shape(layer):
    """Of a mixture, with nothing but the features known."""
    shape = layer.get_build_config()
    shape = shape.get("input_shape") or shape["shapes_dict"]["inputs_shape"]
    return (*(None for _ in shape[:-1]), layer.input_spec.axes[-1])


def _summed(weights, stack):
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


def _dense(layer, label, weights):
    """The average of all experts as `Dense` layers."""
    experts = layer.experts
    if type(experts) is not FeedForwardExperts or layer.shared_experts is not None:
        raise ValueError(
            "`groups` must be given for mixtures that are no dense network: only "
            "FeedForwardExperts without shared experts become one. Received: "
            f"groups=None, a {type(experts).__name__} in {label!r}. Pass "
            "groups=[[0, 1, ...]] and k=1 for a mixture of one expert."
        )
    last = len(experts.kernels) - 1
    dense = []
    for i, kernel in enumerate(experts.kernels):
        dense.append(
            keras.layers.Dense(
                kernel.shape[-1],
                activation=experts.activation if i < last else layer.activation,
                use_bias=experts.use_bias,
                kernel_initializer=experts.kernel_initializer,
                bias_initializer=experts.bias_initializer,
                kernel_regularizer=experts.kernel_regularizer,
                bias_regularizer=experts.bias_regularizer,
                kernel_constraint=experts.kernel_constraint,
                bias_constraint=experts.bias_constraint,
                dtype=experts.dtype_policy,
                name=f"{layer.name}_dense_{i}",
            )
        )
    inputs = keras.Input(batch_shape=_input_shape(layer), dtype=experts.compute_dtype)
    network = keras.Sequential([inputs, *dense], name=layer.name)
    for i, each in enumerate(dense):
        each.kernel.assign(_summed(weights, experts.kernels[i])[0])
        if experts.use_bias:
            each.bias.assign(_summed(weights, experts.biases[i])[0])
    network.trainable = layer.trainable and experts.trainable
    return network
