"""What the gates of a model decide, noted while the model runs."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_moe.types import GatingResult


class RoutingRecord(NamedTuple):
    """One call of a `MoE`.

    Attributes:
        result: What its gate returned, over the tokens that it saw.
        token_indices: `(tokens,)` int64, which of the flattened inputs those
            were where a mask took out others; None means all.
        leading_shape: `(rank - 1,)` int32, the shape before they were flattened.
    """

    result: GatingResult
    token_indices: tf.Tensor | None
    leading_shape: tf.Tensor


@contextlib.contextmanager
def recorded_routing(
    layers: Iterable, names: Iterable[str] | None = None
) -> Iterator[dict[str, list[RoutingRecord]]]:
    """Notes every call of mixtures inside the `with` block.

    Args:
        layers: `MoE` layers.
        names: A different name for each of them. None takes their own names.
            Defaults to `None`.

    Yields:
        For each name the list of the layer's `RoutingRecord`s, in the order of the
        calls.
    """
    layers = list(layers)
    names = [layer.name for layer in layers] if names is None else list(names)
    records: dict[str, list[RoutingRecord]] = {name: [] for name in names}
    for layer, name in zip(layers, names, strict=True):
        layer.on_routing = records[name].append
    try:
        yield records
    finally:
        for layer in layers:
            layer.on_routing = None


def routing_tensors(record: RoutingRecord) -> tuple[tf.Tensor, tf.Tensor]:
    """Experts and gates of every token.

    Args:
        record: Of one call.

    Returns:
        expert_indices: `(*leading_shape, k)` int32. Where a gate gives tokens
            different numbers of experts, k is the largest of them. `-1` where a
            token has fewer, and where it is padding.
        gates: The same shape, float, 0 there.
    """
    result = record.result
    gates, experts = result.gates, result.expert_indices
    num_tokens = tf.reduce_prod(record.leading_shape)
    seen = (
        num_tokens
        if record.token_indices is None
        else tf.shape(record.token_indices)[0]
    )
    if result.is_ragged:
        rows = result.token_indices

        def padded(values, filling):
            ragged = tf.RaggedTensor.from_value_rowids(values, rows, seen)
            return ragged.to_tensor(filling)

        experts, gates = padded(experts, -1), padded(gates, 0)
    if record.token_indices is not None:
        places = record.token_indices[:, tf.newaxis]
        shape = tf.stack([num_tokens, tf.shape(experts)[1]])
        gates = tf.scatter_nd(places, gates, tf.cast(shape, tf.int64))
        experts = tf.scatter_nd(places, experts + 1, tf.cast(shape, tf.int64)) - 1
    k = experts.shape[-1]
    shape = tf.concat([record.leading_shape, tf.shape(experts)[1:]], axis=0)
    experts, gates = tf.reshape(experts, shape), tf.reshape(gates, shape)
    for tensor in (experts, gates):
        tensor.set_shape([*tensor.shape[:-1], k])
    return experts, gates


def routing_arrays(
    records: dict[str, list[RoutingRecord]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`routing_tensors` of mixtures that were called once, as arrays.

    Args:
        records: From `recorded_routing`, outside of a graph.

    Returns:
        Expert indices and gates by the name of the layer.
    """
    return {
        name: tuple(tensor.numpy() for tensor in routing_tensors(record))
        for name, (record,) in records.items()
    }
