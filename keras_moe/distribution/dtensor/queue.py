"""Which assignments the capacity of one device would drop, on a mesh.

First choices go before second ones and, among equals, earlier tokens of the batch before
later ones, as in `functional.make_capacity_plan`. Devices tell each other how many of
their tokens made which choice; no token has to travel for it.
"""

import math

import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe.distribution.dtensor.variables import replicated, sharded_layout
from keras_moe.functional import capacity


def capacity_of(
    num_tokens: int, num_experts: int, k: int, capacity_factor: float
) -> int:
    """`functional.expert_capacity` of a known number of tokens."""
    slots = math.ceil(float(num_tokens) * (capacity_factor * k / num_experts))
    return max(min(slots, num_tokens), 1)


def limit_of(
    num_tokens: int,
    mask: tf.Tensor | None,
    num_experts: int,
    k: int,
    capacity_factor: float,
) -> tf.Tensor:
    """Slots of an expert that may be filled, `()` int32: the capacity of real tokens.

    Args:
        num_tokens: N.
        mask: `(N,)` bool or None. False for padding.
        num_experts: E.
        k: K.
        capacity_factor: Float.
    """
    if mask is None:
        return tf.constant(capacity_of(num_tokens, num_experts, k, capacity_factor))
    num_real = tf.reduce_sum(tf.cast(mask, tf.int64))
    limit = capacity.limit_of(num_real, num_experts, k, capacity_factor)
    return tf.cast(limit, tf.int32)


def fitting(
    experts: tf.Tensor,
    real: tf.Tensor,
    num_experts: int,
    limit: tf.Tensor,
    mesh: dtensor.Mesh,
) -> tf.Tensor:
    """Which assignments fit into the capacity.

    Args:
        experts: `(R, n, K)` int32, a group on every device; the groups in order are
            the tokens of the batch.
        real: `(R, n, K)` bool. False where there is no such assignment.
        num_experts: E.
        limit: `()` int32. Slots of an expert that may be filled.
        mesh: The mesh.

    Returns:
        `(R, n, K)` bool.
    """
    taken = tf.zeros((num_experts,), tf.int32)  # by earlier choices
    fits = []
    for k in range(experts.shape[-1]):
        wanted = real[..., k]
        own = tf.one_hot(
            tf.where(wanted, experts[..., k], -1), num_experts, dtype=tf.int32
        )
        before = tf.cumsum(own, axis=1) - own
        of_groups = replicated(tf.reduce_sum(own, axis=1), mesh)  # (R, E)
        earlier = tf.cumsum(of_groups, axis=0) - of_groups + taken
        earlier = dtensor.relayout(earlier, sharded_layout(mesh, 2))
        taken += tf.reduce_sum(of_groups, axis=0)
        rank = tf.reduce_sum(own * (before + earlier[:, tf.newaxis, :]), axis=-1)
        fits.append(wanted & (rank < limit))
    return tf.stack(fits, axis=-1)
