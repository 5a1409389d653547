"""Assignments sorted by expert in static shapes, by operations that GPUs have.

Whole numbers are int64 within: TensorFlow computes with int32 in the memory of the host
even where the rest is on a GPU, since shapes are int32.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_moe.functional import ops

# From so many experts on assignments are sorted: counting takes time and memory
# proportional to experts times assignments.
_MOST_COUNTED = 512
# Tokens that are counted at once, by a product with a triangular matrix.
_COUNTED_TOGETHER = 128
# Up to so many experts a token its answers lie side by side before they are summed.
MOST_GATHERED = 16


class Sorted(NamedTuple):
    """Assignments sorted by expert; those of an expert in the order of the tokens.

    Attributes:
        order: `(N * K,)` int64. Assignments by expert, those without one last.
        ranks: `(N, K)` int64. Their places among those of the same expert.
        counts: `(E,)` int64. Assignments of each expert.
        starts: `(E,)` int64. Where those of each expert start in `order`.
    """

    order: tf.Tensor
    ranks: tf.Tensor
    counts: tf.Tensor
    starts: tf.Tensor


def sort_by_expert(expert_indices: tf.Tensor, num_experts: int) -> Sorted:
    """Sorts assignments `(N, K)` int64; -1 stands for no expert."""
    k = expert_indices.shape[1]
    if num_experts <= _MOST_COUNTED and k is not None and k <= MOST_GATHERED:
        return _count(expert_indices, num_experts)
    return _sort(expert_indices, num_experts)


def long_range(size: tf.Tensor | int) -> tf.Tensor:
    """`(size,)` int64, the numbers from 0 on."""
    # A range of int32 is made on the host, from sizes that are there, and sent.
    return tf.cast(tf.range(tf.cast(size, tf.int32)), tf.int64)


def take(order: tf.Tensor, rows: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """Entries of `order`, 0 where not valid. `order` may be empty."""
    nothing = tf.zeros([], tf.int64)
    if not order.shape[0]:  # unknown, or none
        order = tf.concat([order, [nothing]], axis=0)
    return tf.where(valid, tf.gather(order, tf.where(valid, rows, nothing)), nothing)


def _count(expert_indices, num_experts):
    """A counting sort: order of assignments `(N * K,)`, ranks `(N, K)` among those of
    the same expert, and for each expert how many there are and where they start.

    Running sums over tokens are products with a triangular matrix of ones, which
    tensor cores compute, and exact: sums of ones in float32.
    """
    num_tokens, k = tf.shape(expert_indices)[0], expert_indices.shape[1]
    chosen = tf.one_hot(expert_indices, num_experts, dtype=tf.float32)  # (N, K, E)
    chosen = tf.reduce_sum(chosen, axis=1)
    together = _COUNTED_TOGETHER
    padding = [[0, -num_tokens % together], [0, 0]]
    blocks = tf.reshape(tf.pad(chosen, padding), [-1, together, num_experts])
    of_blocks = tf.reduce_sum(blocks, axis=1)  # (blocks, E)
    before = tf.matmul(_earlier(together)[tf.newaxis], blocks)
    before += tf.cumsum(of_blocks, exclusive=True)[:, tf.newaxis]
    before = tf.reshape(before, [-1, num_experts])[:num_tokens]
    ranks = tf.cast(ops.pick(before, tf.maximum(expert_indices, 0)), tf.int64)
    if k != 1:  # an own gate may choose an expert twice
        same = expert_indices[:, :, tf.newaxis] == expert_indices[:, tf.newaxis, :]
        same = tf.cast(same, tf.float32) * _earlier(k)
        ranks += tf.cast(tf.reduce_sum(same, axis=2), tf.int64)
    counts = tf.cast(tf.reduce_sum(of_blocks, axis=0), tf.int64)
    has_expert = expert_indices >= 0
    starts = tf.cumsum(counts, exclusive=True)
    rows = tf.gather(starts, tf.maximum(expert_indices, 0))
    rows = tf.reshape(rows + ranks, [-1])
    # Rows are unique, but for one behind all: that of assignments without expert.
    num_rows = tf.size(rows)
    rows = tf.where(tf.reshape(has_expert, [-1]), rows, tf.cast(num_rows, tf.int64))
    one_more = tf.concat([rows, [tf.zeros([], tf.int64)]], axis=0)
    order = tf.scatter_nd(
        rows[:, tf.newaxis], long_range(num_rows), tf.shape(one_more, tf.int64)
    )
    return Sorted(order[:-1], ranks, counts, starts)


def _earlier(size):
    """Matrix with ones at those columns that come before the row."""
    return tf.constant(np.tri(size, k=-1, dtype="float32"))


def _sort(expert_indices, num_experts):
    """The same by a sort, for any number of experts."""
    flat = tf.reshape(expert_indices, [-1])
    flat = tf.where(flat < 0, tf.constant(num_experts, tf.int64), flat)
    order = tf.cast(tf.argsort(flat, stable=True), tf.int64)
    rows = tf.scatter_nd(
        order[:, tf.newaxis], long_range(tf.size(order)), tf.shape(order, tf.int64)
    )
    counts = tf.cast(ops.count_by_expert(expert_indices, num_experts), tf.int64)
    starts = tf.cumsum(counts, exclusive=True)
    ranks = rows - tf.gather(tf.concat([starts, [0]], axis=0), flat)
    return Sorted(order, tf.reshape(ranks, tf.shape(expert_indices)), counts, starts)
