"""Which assignments the capacity of one device would drop, found by every replica.

The capacity is that of the global batch, and so is the queue for it: first choices go
before second ones and, among equals, earlier tokens of the global batch before later
ones. Replicas tell each other how many of their tokens chose which expert, first,
second and so on; no token has to travel for it.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_moe.functional.capacity import limit_of
from keras_moe.functional.dispatching import in_columns, inverse_permutation
from keras_moe.types import GatingResult


class Capacity(NamedTuple):
    """A capacity of a call, the same for every expert.

    Attributes:
        factor: That of `functional.expert_capacity`.
        most_experts: The most experts of a token where their number varies, else None.
    """

    factor: float
    most_experts: int | None = None


def ranks_within_choices(
    expert_indices: tf.Tensor, num_experts: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The place of each assignment among those of the same expert and choice.

    Args:
        expert_indices: `(N, K)` int32, -1 for none. Column c holds choice c.
        num_experts: E.

    Returns:
        ranks: `(N, K)` int32. Tokens before this one with the same expert as choice c.
            What stands at -1 means nothing.
        counts: `(K, E)` int32. Tokens with each expert as choice c.
    """
    num_tokens, k = tf.shape(expert_indices)[0], expert_indices.shape[1]
    # One more stands for none.
    expert = tf.where(expert_indices < 0, num_experts, expert_indices)
    of_choice = tf.range(k)[tf.newaxis, :] * (num_experts + 1)
    ids = tf.reshape(tf.transpose(expert + of_choice), [-1])  # (K * N,)
    counts = tf.math.bincount(
        ids, minlength=k * (num_experts + 1), maxlength=k * (num_experts + 1)
    )
    starts = tf.cumsum(counts, exclusive=True)
    order = tf.argsort(ids, stable=True)
    ranks = inverse_permutation(order) - tf.gather(starts, ids)
    ranks = tf.transpose(tf.reshape(ranks, [k, num_tokens]))
    return ranks, tf.reshape(counts, [k, num_experts + 1])[:, :-1]


def fitting(
    expert_indices: tf.Tensor, all_counts: tf.Tensor, replica: int, limit: tf.Tensor
) -> tf.Tensor:
    """Which assignments of one replica fit into the capacity.

    Args:
        expert_indices: `(N, K)` int32, -1 for none: those of this replica.
        all_counts: `(R, K, E)` int32: tokens of every replica with each expert as
            choice c.
        replica: The replica whose assignments these are.
        limit: `()` int32. Slots of an expert that may be filled.

    Returns:
        `(N, K)` bool. False where there is no expert, too.
    """
    num_choices, num_experts = all_counts.shape[1:]
    ranks, _ = ranks_within_choices(expert_indices, num_experts)
    before = tf.cumsum(tf.reduce_sum(all_counts, axis=0), axis=0, exclusive=True)
    before += tf.reduce_sum(all_counts[:replica], axis=0)  # (K, E)
    choices = tf.zeros_like(expert_indices) + tf.range(num_choices)
    at = tf.stack([choices, tf.maximum(expert_indices, 0)], axis=-1)
    return (expert_indices >= 0) & (ranks + tf.gather_nd(before, at) < limit)


def without_dropped(
    result: GatingResult, capacity: Capacity, num_tokens: tf.Tensor, replicas: object
) -> tuple[GatingResult, tf.Tensor]:
    """What a gate has decided, without what does not fit.

    Args:
        result: Of the tokens of this replica; no padding among them.
        capacity: The `Capacity`.
        num_tokens: `()` int32, tokens of this replica.
        replicas: The `engine.Replicas`.

    Returns:
        result: In which tokens have different numbers of experts.
        overflow: `()` int32, assignments of this replica that are dropped.
    """
    if capacity.most_experts is not None:
        result = in_columns(result, num_tokens, capacity.most_experts)
    experts, num_experts = result.expert_indices, result.statistics.counts.shape[0]
    _, counts = ranks_within_choices(experts, num_experts)
    # With the number of tokens, by one exchange.
    sent = tf.concat([tf.reshape(counts, [-1]), [num_tokens]], axis=0)
    received = replicas.gather(sent)  # type: ignore[attr-defined]
    limit = limit_of(
        tf.reduce_sum(received[:, -1]), num_experts, experts.shape[1], capacity.factor
    )
    all_counts = tf.reshape(received[:, :-1], [-1, experts.shape[1], num_experts])
    index = replicas.index  # type: ignore[attr-defined]
    kept = fitting(experts, all_counts, index, limit)
    places = tf.where(kept)
    overflow = tf.reduce_sum(counts) - tf.shape(places)[0]
    fits = result._replace(
        gates=tf.gather_nd(result.gates, places),
        expert_indices=tf.gather_nd(experts, places),
        token_indices=tf.cast(places[:, 0], tf.int32),
    )
    return fits, overflow
