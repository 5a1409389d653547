"""The gates of a hierarchical mixture in operations of static shapes.

As `HierarchicalGating`, for XLA, GPUs and meshes of devices: every secondary gate sees
every token, and the results of a token's own groups are picked. The gates then cost as
much as the flat gate over all experts; the experts cost what they always do. Off a mesh
tokens go to the gates of their groups alone where there are many experts.
"""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import engine, functional
from keras_moe.layers.secondary_gates import choose, with_levels
from keras_moe.types import GatingResult


def hierarchical_gating(
    layer: Any, inputs: tf.Tensor, mask: tf.Tensor | None, training: bool | None
) -> GatingResult:
    """What `HierarchicalGating` returns.

    Args:
        layer: The built gate.
        inputs: `(N, D)`.
        mask: `(N,)` bool or None. False leaves a token out.
        training: Whether the gates add their noise.

    Returns:
        The `GatingResult`.
    """
    primary = layer.primary_gating(inputs, mask=mask, training=training)
    # (N, K1); a GPU computes with int64, with int32 the host does.
    groups = tf.cast(primary.expert_indices, tf.int64)
    num_groups, k1 = layer.num_groups, groups.shape[1]
    size = layer.num_experts // num_groups
    members = [
        tf.one_hot(groups[:, k], num_groups, dtype=inputs.dtype) for k in range(k1)
    ]
    every = _every_gate if _sees_all(layer) else _own_gates
    clean = every(inputs, layer.gate_kernel, groups, members)  # (N, K1, b)
    if layer.use_bias:
        own = [tf.matmul(member, layer.gate_bias) for member in members]
        clean += tf.stack(own, axis=1)
    load, k2, raw_noise = None, layer.k[1], None
    if training and hasattr(layer, "noise_kernel"):
        raw_noise = _rows(every(inputs, layer.noise_kernel, groups, members))
    row_mask = None
    if mask is not None:
        row_mask = tf.reshape(tf.stack([mask] * k1, axis=1), [-1])
    secondary, probs = choose(
        layer,
        _rows(clean),
        raw_noise,
        lambda: _rows(_noise(layer, groups, members, size, mask)),
        row_mask,
        training,
    )
    if probs is not None:
        load = _load(tf.reshape(probs, tf.shape(clean)), members, mask)
        load = functional.hierarchical_load(
            primary.statistics.load, load, primary.statistics.counts
        )
    gates, expert_indices = functional.hierarchical_gates(
        tf.reshape(primary.gates, [-1]),
        tf.reshape(groups, [-1]),
        secondary.gates,
        secondary.indices,
        size,
    )
    # A group of -1 is none, and so are its experts.
    none = tf.reshape(groups, [-1, 1]) < 0
    expert_indices = tf.where(none, -tf.ones_like(expert_indices), expert_indices)
    shape = [_num_tokens(inputs), k1 * k2]
    result = functional.make_gating_result(
        tf.reshape(gates, shape),
        tf.reshape(tf.cast(expert_indices, tf.int64), shape),
        layer.num_experts,
        load=load,
        mask=mask,
    )
    return with_levels(result, primary, secondary)


def _num_tokens(x):
    """An int if it is known, as meshes want it."""
    return tf.shape(x)[0] if x.shape[0] is None else x.shape[0]


def _rows(x):
    """`(N, K1, b)` -> `(N * K1, b)`."""
    return tf.reshape(x, [-1, x.shape[-1]])


# Beyond so many experts tokens go to the gates of their groups.
_MOST_SEEN = 1024


def _sees_all(layer):
    """Whether the gates of all groups see every token."""
    return layer.num_experts <= _MOST_SEEN or not engine.current().values_are_here


def _every_gate(inputs, kernel, groups, members):
    """Logits of the chosen groups, `(N, K1, b)`, picked from those of all."""
    kernel = tf.convert_to_tensor(kernel)  # (G, D, b)
    num_groups, features, size = kernel.shape
    flat = tf.reshape(tf.transpose(kernel, [1, 0, 2]), [features, num_groups * size])
    every = tf.reshape(tf.matmul(inputs, flat), [-1, num_groups, size])
    picked = [
        tf.reduce_sum(every * own[..., tf.newaxis], axis=1, keepdims=True)
        for own in members
    ]
    return tf.concat(picked, axis=1)


def _own_gates(inputs, kernel, groups, members):
    """The same, computed for the chosen groups alone."""
    kernel = tf.convert_to_tensor(kernel)
    plan = functional.make_slot_plan(groups, kernel.shape[0])
    return functional.run_in_slots(tf.matmul, inputs, plan, [kernel])


def _noise(layer, groups, members, size, mask):
    """`(N, K1, b)`: the rows that one device draws for rows sorted by group."""
    drawn = keras.random.normal(
        (_num_tokens(groups) * groups.shape[1], size),
        dtype=layer.compute_dtype,
        seed=layer.seed_generator,
    )
    chosen = tf.add_n(members)  # (N, G), in floats, which a GPU can add
    if mask is not None:
        chosen *= tf.cast(mask, chosen.dtype)[:, tf.newaxis]
    replicated = engine.current().operations.replicated
    chosen = replicated(chosen)
    totals = tf.reduce_sum(chosen, axis=0)
    places = tf.cumsum(chosen, axis=0, exclusive=True)
    places += tf.cumsum(totals, exclusive=True)
    own = [tf.reduce_sum(places * each, axis=1) for each in members]
    return tf.gather(replicated(drawn), tf.cast(tf.stack(own, axis=1), tf.int64))


def _load(probs, members, mask):
    """`(N, K1, b)` -> `(G, b)`: sums over the tokens of each group."""
    total = 0.0
    for k, own in enumerate(members):
        if mask is not None:
            own = own * tf.cast(mask, own.dtype)[:, tf.newaxis]
        total += tf.matmul(own, probs[:, k], transpose_a=True)
    return total
