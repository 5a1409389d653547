"""The choice within the groups of a gate of two levels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe import functional
from keras_moe.functional.hierarchical import choices_of_levels
from keras_moe.types import GatingResult


class SecondaryGates(NamedTuple):
    """What the secondary gates give.

    Attributes:
        gates: `(M, k2)` float within the group.
        indices: `(M, k2)` int32 within the group.
        load: `(groups here, group size)` in training, else None. Smooth where there
            is noise.
        auxiliary_losses: As of a `GatingResult`.
        choices_kept: Likewise.
    """

    gates: tf.Tensor
    indices: tf.Tensor
    load: tf.Tensor | None
    auxiliary_losses: tuple = ()
    choices_kept: tuple = ()


def choose(
    layer: Any,
    clean: tf.Tensor,
    raw_noise: tf.Tensor | None,
    draw: Callable[[], tf.Tensor],
    row_mask: tf.Tensor | None,
    training: bool | None,
) -> tuple[SecondaryGates, tf.Tensor | None]:
    """The choice within the groups, of rows that each have the logits of one.

    Args:
        layer: The `HierarchicalGating`.
        clean: `(M, group size)` logits without noise.
        raw_noise: `(M, group size)` where the noise is learned, else None.
        draw: Gives standard normal noise, `(M, group size)`.
        row_mask: `(M,)` bool or None. False marks padding.
        training: Whether the gates add their noise.

    Returns:
        secondary: `SecondaryGates` without a load.
        probs: `(M, group size)`, which summed over the rows of a group are its
            load in training, else None.
    """
    k, normalization = layer.k[1], layer.secondary_normalization
    if not training or layer._noise.is_none:
        gates, indices = functional.top_k_gating(clean, k, normalization)
        found = SecondaryGates(gates, indices, None)
        if not training:
            return found, None
        size = clean.shape[-1]
        parts = [
            tf.one_hot(tf.cast(indices[:, i], tf.int64), size, dtype=clean.dtype)
            for i in range(k)
        ]
        probs = tf.add_n(parts)
    else:
        layer._noise.tick(clean)
        # Every expert of a chosen group takes the token if k is their number.
        gates, indices, probs = layer._noise.top_k_gating(
            clean, raw_noise, draw(), k, normalization
        )
        found = SecondaryGates(gates, indices, None)
        if k < clean.shape[-1]:
            kept = functional.choices_kept(clean, indices, row_mask)
            found = found._replace(choices_kept=kept)
    return found._replace(
        auxiliary_losses=layer._losses_of(clean, None, row_mask)
    ), probs


def with_levels(
    result: GatingResult, primary: GatingResult, secondary: SecondaryGates
) -> GatingResult:
    """A result with the losses and the choices kept of both levels."""
    return result._replace(
        auxiliary_losses=(*primary.auxiliary_losses, *secondary.auxiliary_losses),
        choices_kept=choices_of_levels(primary.choices_kept, secondary.choices_kept),
    )
