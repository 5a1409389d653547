"""A mixture over the devices of a mesh: explicit exchanges, nothing dropped.

Tokens lie `(R, n, D)`, n on every device, which lays out those of each expert in slots
`(R, E, C, D)`. An all-to-all takes them to the devices of their experts, and one back
takes the answers home, both within a group of devices that has all experts
(`groups`). The backward pass does the same with the gradients, so there are four in a
step. It sends tokens and upstream gradients together, and computes the
hidden activations again instead of keeping them (appendix D).

Shapes are static under DTensor, so the number of slots C must be chosen before the
gate has. The step holds a branch for each of a few numbers, and takes the least that
fits: the last one, n slots for every expert, fits always.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe.distribution.dtensor.groups import groups_of
from keras_moe.distribution.dtensor.variables import sharded_layout

# Slots of an expert, in multiples of its fair share.
_FACTORS = (1.5, 3.0)
# A number of slots that saves less than this share of n is not worth a branch.
_LEAST_SAVING = 0.25


class Choice(NamedTuple):
    """Which experts the tokens of each device chose.

    Attributes:
        experts: `(R, n, K)` int32 within [0, E).
        real: `(R, n, K)` bool. False where there is no such choice.
        chosen: `(R, n, E)` int32. How many of a token's choices are that expert:
            0 or 1, if a gate does not pick an expert twice.
        ranks: `(R, n, E)` int32. Tokens before this one that chose the expert.
        most: `()` int32. Most tokens that one expert has of one device.
    """

    experts: tf.Tensor
    real: tf.Tensor
    chosen: tf.Tensor
    ranks: tf.Tensor
    most: tf.Tensor


def make_choice(experts: tf.Tensor, real: tf.Tensor, num_experts: int) -> Choice:
    """Counts and ranks the choices of each device, without leaving it.

    Args:
        experts: `(R, n, K)` int32 within [0, E).
        real: `(R, n, K)` bool. False where there is no such choice.
        num_experts: E, with the padding.

    Returns:
        The `Choice`.
    """
    chosen = tf.zeros_like(experts[..., 0])[..., tf.newaxis] + tf.zeros(
        (num_experts,), tf.int32
    )
    for k in range(experts.shape[-1]):  # (R, n, K, E) is never made
        chosen += tf.one_hot(
            tf.where(real[..., k], experts[..., k], -1), num_experts, dtype=tf.int32
        )
    once = tf.minimum(chosen, 1)
    ranks = tf.cumsum(once, axis=1) - once
    most = tf.reduce_max(tf.reduce_sum(once, axis=1))
    return Choice(experts, real, chosen, ranks, most)


def slot_numbers(
    num_tokens: int, num_experts: int, k: float, most: int | None = None
) -> list[int]:
    """The numbers of slots that a step has branches for.

    Args:
        num_tokens: n, tokens of a device.
        num_experts: E, those that can be chosen.
        k: Experts for each token, on average.
        most: The most that an expert can get of a device, where it has a capacity.
            Defaults to `None`, n.

    Returns:
        Ascending; the last one is `most`, which fits whatever the gate does.
    """
    most = num_tokens if most is None else most
    share = num_tokens * k / num_experts
    numbers = [math.ceil(factor * share) for factor in _FACTORS]
    limit = (1.0 - _LEAST_SAVING) * most
    return [c for c in sorted(set(numbers)) if 1 <= c <= limit] + [most]


def mix(
    tokens: tf.Tensor,
    gates: tf.Tensor,
    choice: Choice,
    network: Callable,
    weights: list[tf.Tensor],
    mesh: dtensor.Mesh,
    slots: list[int],
) -> tf.Tensor:
    """Runs the experts on their tokens and sums their answers.

    Args:
        tokens: `(R, n, D)`, sharded over the first axis.
        gates: `(R, n, K)`, dtype of the tokens, likewise.
        choice: From `make_choice`.
        network: Maps `(G * E, rows, D)` and the weights to `(G * E, rows, D_out)`.
        weights: Tensors `(G * E, ...)`, sharded over the first axis.
        mesh: The mesh.
        slots: From `slot_numbers`.

    Returns:
        `(R, n, D_out)`, sharded over the first axis.
    """

    @tf.custom_gradient
    def run(tokens, gates, *weights):
        def forward(num_slots):
            layout = _Slots(choice, num_slots, mesh)
            inputs = layout.to_experts(layout.rows_of(tokens))
            return layout.sum_of(layout.to_tokens(network(inputs, *weights)), gates)

        def backward(upstream, num_slots):
            layout = _Slots(choice, num_slots, mesh)
            return layout.gradients(tokens, gates, upstream, network, weights)

        def grad(upstream):
            # Without this, layouts may propagate from what follows.
            upstream = dtensor.relayout(upstream, sharded_layout(mesh, 3))
            return _least_fitting(
                choice.most, slots, lambda num_slots: backward(upstream, num_slots)
            )

        return _least_fitting(choice.most, slots, forward), grad

    return run(tokens, gates, *weights)


def _least_fitting(most, slots, function):
    """`function` of the least of the numbers that is at least `most`."""
    if len(slots) == 1:
        return function(slots[0])
    return tf.cond(
        most <= slots[0],
        lambda: function(slots[0]),
        lambda: _least_fitting(most, slots[1:], function),
    )


class _Slots:
    """The slots of one branch: which token is where, and how it travels."""

    def __init__(self, choice, num_slots, mesh):
        self.choice = choice
        self.num_slots = num_slots
        self.mesh = mesh
        devices, num_tokens, num_experts = choice.chosen.shape
        self.shape = (devices, num_experts, num_slots)
        chosen_REn = tf.transpose(choice.chosen, [0, 2, 1])
        ranks = choice.ranks
        if num_slots == num_tokens:  # every token has its own slot, filled or not
            places = tf.range(num_tokens)
            self.filled = chosen_REn > 0
            self.tokens = tf.zeros_like(chosen_REn) + places
            ranks = tf.zeros_like(ranks) + places[:, tf.newaxis]
        else:
            # Earlier tokens have larger keys; what was not chosen has 0.
            keys = tf.range(num_tokens, 0, -1, tf.int32)
            keys = tf.where(chosen_REn > 0, keys, tf.zeros_like(chosen_REn))
            best = tf.math.top_k(keys, num_slots).values
            self.filled = best > 0
            self.tokens = tf.where(self.filled, num_tokens - best, 0)
        # The slot of each choice, and its share of what comes back to the token.
        self.places, self.shares = [], []
        for k in range(choice.experts.shape[-1]):
            expert, real = choice.experts[..., k], choice.real[..., k]
            own = tf.one_hot(expert, num_experts, dtype=tf.int32)
            rank = tf.reduce_sum(own * ranks, axis=-1)
            times = tf.reduce_sum(own * choice.chosen, axis=-1)
            self.places.append(tf.where(real, expert * num_slots + rank, 0))
            share = 1.0 / tf.cast(tf.maximum(times, 1), tf.float64)
            self.shares.append(tf.where(real, share, tf.zeros_like(share)))

    def rows_of(self, values):
        """`(R, n, D)` -> `(R, E, C, D)`, zeros in empty slots."""
        devices, num_experts, num_slots = self.shape
        index = tf.reshape(self.tokens, [devices, num_experts * num_slots])
        rows = tf.gather(values, index, batch_dims=1)
        rows = tf.reshape(rows, [*self.shape, values.shape[-1]])
        filled = self.filled[..., tf.newaxis]
        return tf.where(filled, rows, tf.zeros_like(rows))

    def to_experts(self, rows):
        """`(R, E, C, D)` -> `(G * E, P * C, D)`: an all-to-all."""
        return groups_of(self.mesh).to_experts(rows)

    def to_tokens(self, rows):
        """`(G * E, P * C, D)` -> `(R, E * C, D)`: an all-to-all."""
        devices, num_experts, num_slots = self.shape
        rows = groups_of(self.mesh).to_tokens(rows)
        return tf.reshape(rows, [devices, num_experts * num_slots, rows.shape[-1]])

    def sum_of(self, rows, gates):
        """`(R, E * C, D)` -> `(R, n, D)`: each token's rows, weighted."""
        parts = [
            tf.gather(rows, place, batch_dims=1) * gates[..., k, tf.newaxis]
            for k, place in enumerate(self.places)
        ]
        return dtensor.relayout(tf.add_n(parts), sharded_layout(self.mesh, 3))

    def gradients(self, tokens, gates, upstream, network, weights):
        """With regard to tokens, gates and weights."""
        width, width_out = tokens.shape[-1], upstream.shape[-1]
        dtype = tokens.dtype
        experts = self.choice.chosen.shape[-1]
        # The gate of each token for each expert, at the slot of the two.
        dense = tf.add_n(
            [
                tf.one_hot(expert, experts, dtype=dtype)
                * tf.where(real, gate, tf.zeros_like(gate))[..., tf.newaxis]
                for expert, real, gate in zip(
                    tf.unstack(self.choice.experts, axis=-1),
                    tf.unstack(self.choice.real, axis=-1),
                    tf.unstack(gates, axis=-1),
                    strict=True,
                )
            ]
        )
        gates_REn = tf.transpose(dense, [0, 2, 1])
        at_slots = tf.gather(gates_REn, self.tokens, batch_dims=2)
        at_slots = tf.where(self.filled, at_slots, tf.zeros_like(at_slots))
        sent = tf.concat(
            [self.rows_of(tokens), self.rows_of(upstream), at_slots[..., tf.newaxis]],
            axis=-1,
        )
        inputs, d_sum, gate = tf.split(
            self.to_experts(sent), [width, width_out, 1], axis=-1
        )
        with tf.GradientTape() as tape:
            tape.watch([inputs, *weights])
            outputs = network(inputs, *weights)
        d_inputs, *d_weights = tape.gradient(
            outputs, [inputs, *weights], gate * d_sum, unconnected_gradients="zero"
        )
        d_gate = tf.reduce_sum(outputs * d_sum, axis=-1, keepdims=True)
        back = self.to_tokens(tf.concat([d_inputs, d_gate], axis=-1))
        rows = [tf.gather(back, place, batch_dims=1) for place in self.places]
        d_tokens = tf.add_n(
            [
                row[..., :width] * tf.cast(share, dtype)[..., tf.newaxis]
                for row, share in zip(rows, self.shares, strict=True)
            ]
        )
        d_gates = tf.stack([row[..., width] for row in rows], axis=-1)
        d_gates = tf.where(self.choice.real, d_gates, tf.zeros_like(d_gates))
        grouped = sharded_layout(self.mesh, 3)
        return [
            dtensor.relayout(d_tokens, grouped),
            dtensor.relayout(d_gates, grouped),
            *(
                dtensor.relayout(d, sharded_layout(self.mesh, d.shape.rank))
                for d in d_weights
            ),
        ]
