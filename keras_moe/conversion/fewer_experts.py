"""Mixtures made smaller: experts left out, or averaged."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_moe import checks
from keras_moe.conversion.blocks import blocks_of, with_network
from keras_moe.conversion.pairs import chosen, named_layers
from keras_moe.conversion.rebuilding import array_of, rebuild, verify_specs
from keras_moe.conversion.resizing import Parts, input_shapes, resized, summed
from keras_moe.layers.experts import FeedForwardExperts
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

    parts = Parts()

    def pruned(label, layer):
        own = _own(keep, label)
        if np.ndim(own) == 0:
            most = checks.verify_int(own, "keep", 1, layer.num_experts)
            counts = _usage_of(layer, label, usage)
            # The most used; of equals the first.
            own = np.sort(np.argsort(-counts, kind="stable")[:most])
        own = _verify_indices(own, "keep", layer.num_experts)
        weights = np.eye(layer.num_experts)[own]
        return resized(label, layer, weights, k, parts, own)

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
            `FeedForwardExperts`, or shared ones, or `gate_inputs`.

    Example:

    >>> dense = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(32, "gelu"), keras.layers.Dense(8)]
    ... )
    >>> again = keras_moe.merge_experts(keras_moe.upcycle(dense, num_experts=4, k=2))
    >>> x = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")
    >>> np.testing.assert_allclose(again(x), dense(x), atol=1e-5)
    """

    parts = Parts()

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
        return resized(label, layer, weights, k, parts)

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
    shape, *seen_by_gate = input_shapes(layer)
    if seen_by_gate:
        raise ValueError(
            "`groups` must be given for mixtures with `gate_inputs`, which a dense "
            f"network does not take. Received: groups=None, {label!r}. Pass "
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
    inputs = keras.Input(batch_shape=shape, dtype=experts.compute_dtype)
    network = keras.Sequential([inputs, *dense], name=layer.name)
    for i, each in enumerate(dense):
        each.kernel.assign(summed(weights, experts.kernels[i])[0])
        if experts.use_bias:
            each.bias.assign(summed(weights, experts.biases[i])[0])
    network.trainable = layer.trainable and experts.trainable
    return network
