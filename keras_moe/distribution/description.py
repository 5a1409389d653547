"""What lives where: a table of a model's experts and words over its devices."""

import math
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.distribution import compatibility
from keras_moe.distribution.dtensor.description import (
    Layouts,
    describe_layouts,
    is_on_mesh,
)
from keras_moe.distribution.messages import as_table
from keras_moe.distribution.mirrored.expert_variable import ExpertVariable
from keras_moe.distribution.topology import (
    exchange_bytes,
    gradient_bytes,
    shard_bytes,
)


class Share(NamedTuple):
    """What one replica holds of one layer's experts, or of its vocabulary.

    Attributes:
        layer: Path of the layer that owns the weights.
        replica: Number of the replica among those of all processes.
        device: Its device, where this process knows it, else `"other process"`.
        entries: The experts, the groups of a hierarchical gate, or the words of a
            vocabulary, that live there.
        weight_bytes: Bytes of their weights.
        slot_bytes: Bytes of the optimizer's state for them; 0 before it is built.
        group: Number of the expert-parallel group of the replica. Each group holds
            all experts.
    """

    layer: str
    replica: int
    device: str
    entries: range
    weight_bytes: int
    slot_bytes: int
    group: int = 0


class Description(NamedTuple):
    """Where the weights of a model live. Prints as a table.

    Attributes:
        shares: A `Share` for each layer of experts and each replica.
        replicated_bytes: Bytes of the weights and optimizer state that every
            replica has a copy of.
        num_replicas: Replicas, of all processes.
        traffic: For each mixture, the bytes that leave a replica in a training
            step, without padding and with even routing; empty without
            `num_tokens`.
        gradient_traffic: The bytes that leave a replica in a training step, at most,
            to sum the gradients of experts over expert-parallel groups; 0 with one
            group. Those of other weights not counted.
    """

    shares: tuple[Share, ...]
    replicated_bytes: int
    num_replicas: int
    traffic: dict[str, int]
    gradient_traffic: int = 0

    def __str__(self) -> str:
        groups = any(share.group for share in self.shares)
        head = ("layer", *["group"] * groups, "replica", "device", "entries")
        rows = [(*head, "weights", "optimizer")]
        for share in self.shares:
            entries = share.entries
            rows.append(
                (
                    share.layer,
                    *[str(share.group)] * groups,
                    str(share.replica),
                    share.device,
                    f"{entries.start}-{entries.stop - 1}" if entries else "none",
                    f"{share.weight_bytes:,} B",
                    f"{share.slot_bytes:,} B",
                )
            )
        notes = [
            f"On each of {self.num_replicas} replicas besides: "
            f"{self.replicated_bytes:,} B of weights and optimizer state."
        ]
        for layer, sent in self.traffic.items():
            notes.append(f"{layer}: {sent:,} B leave a replica in a training step.")
        if self.gradient_traffic:
            notes.append(
                f"Gradients of experts: {self.gradient_traffic:,} B leave a replica in "
                "a training step, to the other groups."
            )
        return as_table(rows, notes)


def describe(
    model: keras.Model, num_tokens: int | None = None
) -> Description | Layouts:
    """Which expert or word lives on which device, what it takes there, and what travels.

    Args:
        model: A built Keras model, under a strategy or not.
        num_tokens: Int or None. Tokens of the global batch, for the traffic.
            Defaults to `None`.

    Returns:
        A `Description`, or `Layouts` for a model on a mesh of DTensor; `print` shows
        a table.

    Raises:
        ValueError: The model is not built, or `num_tokens` is below 1.

    Example:

    >>> layer = keras_moe.layers.MoE(keras_moe.layers.FeedForwardExperts(4, 8))
    >>> model = keras.Sequential([keras.Input((16,)), layer])
    >>> keras_moe.distribution.describe(model).num_replicas
    1

    Reference:
        Shazeer et al. 2017, section 3.1.
    """
    if not model.built:
        raise ValueError(
            f"`model` must be built. Received: {model.name!r}, which has no weights "
            "yet. Call it on a batch first."
        )
    if num_tokens is not None:
        num_tokens = checks.verify_positive_int(num_tokens, "num_tokens")
    if is_on_mesh(model):
        return describe_layouts(model)
    optimizer = getattr(model, "optimizer", None)
    slots = list(optimizer.variables) if optimizer is not None else []
    every = [*model.variables, *slots]
    sharded = [v for v in model.variables if isinstance(v, ExpertVariable)]
    replicated = sum(
        _num_bytes(v.shape, v.dtype) for v in every if not isinstance(v, ExpertVariable)
    )
    shares: list[Share] = []
    for layer in dict.fromkeys(_layer_of(v) for v in sharded):
        own = [v for v in sharded if _layer_of(v) == layer]
        state = [v for v in slots if any(getattr(v, "slot_of", None) is w for w in own)]
        shares += _shares(layer, own, state)
    # Those of layers that are experts are alike on all replicas.
    of_layers = [getattr(v, "of_experts", 1) for v in every]
    num_replicas = max([1, *of_layers, *(v.shards.num_replicas for v in sharded)])
    traffic = _traffic(model, num_tokens, num_replicas) if num_tokens else {}
    return Description(
        tuple(shares), replicated, num_replicas, traffic, _gradient_traffic(sharded)
    )


def _shares(layer, weights, slots):
    """The `Share` of each replica in one layer's weights."""
    shards = weights[0].shards
    devices = dict(compatibility.component_devices(weights[0].strategy))

    def held(variables):
        none = np.zeros(shards.num_replicas, np.int64)
        return sum(map(_part_bytes, variables), none)

    weight_bytes, slot_bytes = held(weights), held(slots)
    return [
        Share(
            layer,
            replica,
            devices.get(replica, "other process").split("/")[-1],
            shards.experts_of(replica),
            int(weight_bytes[replica]),
            int(slot_bytes[replica]),
            shards.group_of(replica),
        )
        for replica in range(shards.num_replicas)
    ]


def _gradient_traffic(variables):
    """The most bytes that leave a replica to sum the gradients of expert weights."""
    sent = [gradient_bytes(v.shards, _part_bytes(v)) for v in variables if v.trainable]
    return int(np.max(np.sum(sent, axis=0))) if sent else 0


def _part_bytes(variable):
    """`(R,)`: bytes that each replica holds of a sharded weight."""
    itemsize = tf.as_dtype(variable.dtype).size
    shape = tuple(variable.shape)
    return shard_bytes(variable.shards, shape, itemsize, variable.axis)


def _traffic(model, num_tokens, num_replicas):
    """Bytes that leave a replica in a step, for each mixture with sharded experts."""
    found = {}
    for layer in model._flatten_layers():
        experts, gating = (
            getattr(layer, "experts", None),
            getattr(layer, "gating", None),
        )
        weights = [
            v for v in getattr(experts, "weights", ()) if isinstance(v, ExpertVariable)
        ]
        are_layers = getattr(experts, "experts_are_layers", False)
        travels, sharded = weights or are_layers, weights and not are_layers
        k = getattr(gating, "k", None)
        if not travels or k is None or num_replicas == 1:
            continue
        features = layer.input_spec.axes[-1]
        output = layer.compute_output_shape((None, features))[-1]
        if not isinstance(k, int):  # a row for each group, with its primary gate
            k, features = k[0], features + 2
        found[layer.name] = exchange_bytes(
            num_tokens,
            k,
            (features + output) / 2,
            tf.as_dtype(layer.compute_dtype).size,
            num_replicas,
            # Layers that are experts are shared out among all replicas.
            weights[0].shards.group_size if sharded else None,
        )
    return found


def _layer_of(variable):
    return variable.path.rpartition("/")[0]


def _num_bytes(shape, dtype):
    return math.prod(shape) * tf.as_dtype(dtype).size
