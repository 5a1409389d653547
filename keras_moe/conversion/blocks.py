"""Transformer blocks of this package with another feed-forward network."""

from typing import Any

import keras

from keras_moe.conversion.pairs import named_layers
from keras_moe.conversion.rebuilding import copy_weights
from keras_moe.layers.moe import MoE
from keras_moe.layers.transformer import MoETransformerBlock


def blocks_of(model: keras.layers.Layer) -> list[MoETransformerBlock]:
    """The blocks in a model, or the model if it is one."""
    layers = [model, *(layer for _, layer in named_layers(model))]
    return [layer for layer in layers if isinstance(layer, MoETransformerBlock)]


def dense_of(block: MoETransformerBlock) -> tuple[Any, Any]:
    """The two layers of a block's own dense network; (None, None) if it has another."""
    # Attributes of the blocks that make them.
    return getattr(block, "hidden_dense", None), getattr(block, "output_dense", None)


def with_network(block: MoETransformerBlock, network: Any) -> MoETransformerBlock:
    """A built block with another feed-forward network, and copies of the other weights.

    Args:
        block: The block as it was, built.
        network: A built `MoE`, or another layer.

    Raises:
        ValueError: The block takes no such mixture.
    """
    is_mixture = isinstance(network, MoE)
    parts = {
        "moe": network if is_mixture else None,
        "feed_forward": None if is_mixture else network,
    }
    new = type(block).from_config({**block.get_config(), **parts})
    new.build_from_config(block.get_build_config())
    new.built = True
    before = (block.moe, block.feed_forward, *dense_of(block))
    for old_part, part in zip(
        _parts(block, before), _parts(new, [network]), strict=True
    ):
        copy_weights(old_part, part)
    return new


def _parts(block, network):
    """Layers of a block without its network."""
    leave = {id(layer) for layer in network}
    inner = block._flatten_layers(recursive=False, include_self=False)
    return [layer for layer in inner if id(layer) not in leave]
