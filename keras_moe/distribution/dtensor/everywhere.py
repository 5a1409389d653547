"""Experts whose weights every device of a mesh has: those that are not stacked.

A step on a mesh is one program for all devices, so different layers cannot run on
different ones. Each device runs all of these experts on the tokens that it has, each in
a slot of its own, as XLA has it on one device; a mask tells an expert which slots are
its own. No token travels, gradients are summed, and batch statistics are those of all
tokens of an expert.
"""

from typing import Any

import tensorflow as tf


def mix(
    experts: Any,
    tokens: tf.Tensor,
    gates: tf.Tensor,
    chosen: tf.Tensor,
    real: tf.Tensor,
) -> tf.Tensor:
    """Runs every expert on every token, and sums the answers of those chosen.

    Args:
        experts: The layer of all experts.
        tokens: `(N, D)`.
        gates: `(N, K)` float.
        chosen: `(N, K)` int32 within [0, E).
        real: `(N, K)` bool. False where there is no such assignment.

    Returns:
        `(N, output_units)`.
    """
    num_experts = experts.num_experts
    shares, filled = [], []
    for index in range(num_experts):
        is_own = real & (chosen == index)
        shares.append(tf.reduce_sum(tf.where(is_own, gates, tf.zeros_like(gates)), 1))
        filled.append(tf.reduce_any(is_own, axis=1))
    nothing = tf.zeros_like(tokens)
    slots = [
        tf.where(own[:, tf.newaxis] | tf.zeros_like(tokens, tf.bool), tokens, nothing)
        for own in filled
    ]
    counts = tf.fill([num_experts], tokens.shape[0])
    if getattr(experts, "experts_are_layers", False):
        counts = tf.stack(filled)  # a mask
    answers = tf.unstack(experts(tf.stack(slots), counts=counts), num=num_experts)
    weighted = []
    for answer, own, share in zip(answers, filled, shares, strict=True):
        is_own = own[:, tf.newaxis] | tf.zeros_like(answer, tf.bool)
        share = tf.cast(share, answer.dtype)[:, tf.newaxis]
        weighted.append(tf.where(is_own, answer * share, tf.zeros_like(answer)))
    return tf.add_n(weighted)
