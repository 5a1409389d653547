"""Takes tokens to the devices of their experts on a mesh, and the answers back."""

from typing import Any

import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe import functional
from keras_moe.distribution.dtensor import everywhere, exchange, queue
from keras_moe.distribution.dtensor.groups import groups_of
from keras_moe.distribution.dtensor.variables import replicated, sharded_layout
from keras_moe.distribution.messages import other_scope


class MeshDispatcher(functional.Dispatcher):
    """Dispatch over the devices of a mesh, in operations of static shapes.

    Args:
        mesh: The mesh.
        k: Experts for each token on average, if the gate says. None takes the
            width of the gates. Defaults to `None`.
        capacity_factor: Float or None. That of the global batch, see
            `functional.expert_capacity`; None drops nothing. Defaults to `None`.
    """

    static_shapes = True

    def __init__(
        self,
        mesh: dtensor.Mesh,
        k: int | None = None,
        capacity_factor: float | None = None,
    ):
        self._mesh, self._k, self._capacity_factor = mesh, k, capacity_factor

    def mix(self, experts, tokens, result, mask=None):
        if result.is_ragged:
            raise ValueError(
                "A gate on a mesh must give gates (tokens, k), where -1 stands for no "
                "expert: DTensor has no shapes that depend on the data. Received: gates "
                f"of shape {result.gates.shape} with `token_indices`. Make the result by "
                "`functional.make_selection_result`, which gives what a mesh takes."
            )
        gates, chosen = result.gates, result.expert_indices
        num_tokens, k = chosen.shape
        real = chosen >= 0
        if mask is not None:
            real = real & mask[:, tf.newaxis]
        missing = -num_tokens % self._mesh.size
        grouped_choice, grouped_real = (
            self._grouped(each, missing) for each in (chosen, real)
        )
        most, overflow = grouped_real.shape[1], tf.constant(0)
        if self._capacity_factor is not None:
            shape = experts.num_experts, k, self._capacity_factor
            most = min(most, queue.capacity_of(num_tokens, *shape))
            wanted = grouped_real
            grouped_real = queue.fitting(
                grouped_choice,
                wanted,
                experts.num_experts,
                queue.limit_of(num_tokens, mask, *shape),
                self._mesh,
            )
            overflow = tf.reduce_sum(tf.cast(wanted & ~grouped_real, tf.int32))
            real = self._together(grouped_real, missing)
        if not getattr(experts, "stacked_weights", ()):
            outputs = everywhere.mix(experts, tokens, gates, chosen, real)
            return functional.Mixed(outputs, overflow)
        weights = self._weights_of(experts, tokens)
        dtype = tf.as_dtype(experts.compute_dtype)
        tokens, gates = (
            self._grouped(tf.cast(each, dtype), missing) for each in (tokens, gates)
        )
        chosen, real = grouped_choice, grouped_real
        padded = groups_of(self._mesh).num_padded(experts.num_experts)
        choice = exchange.make_choice(chosen, real, padded)
        slots = exchange.slot_numbers(
            tokens.shape[1], experts.num_experts, self._k or k, most
        )
        gates = tf.where(real, gates, tf.zeros_like(gates))
        outputs = exchange.mix(
            tokens, gates, choice, experts.compute, weights, self._mesh, slots
        )
        return functional.Mixed(self._together(outputs, missing), overflow)

    def _together(self, grouped, missing):
        """`(R, n, D)` -> `(N, D)`."""
        rows = tf.reshape(grouped, [-1, grouped.shape[-1]])
        if not missing:
            return rows
        rows = replicated(rows, self._mesh)
        return replicated(rows[: rows.shape[0] - missing])

    def _weights_of(self, experts: Any, tokens: tf.Tensor) -> list:
        variables = experts.stacked_weights
        for variable in variables:
            if getattr(variable, "mesh", None) != self._mesh:
                raise other_scope(
                    f"weight {variable.path!r} of another strategy or of none, in a "
                    "step on a mesh"
                )
        dtype = tf.as_dtype(experts.compute_dtype)
        values = experts.values(tokens)
        own, others = values[: len(variables)], values[len(variables) :]
        others = [self._by_experts(value) for value in others]
        return [*(tf.cast(value, dtype) for value in own), *others]

    def _by_experts(self, value):
        """`(E, ...)`, whole on every device -> each device has its experts'."""
        groups = groups_of(self._mesh)
        missing = groups.num_padded(value.shape[0]) - value.shape[0]
        rest = [[0, 0]] * (value.shape.rank - 1)
        value = replicated(tf.pad(value, [[0, missing], *rest]))
        value = replicated(tf.concat([value] * groups.number, axis=0))
        return dtensor.relayout(value, sharded_layout(self._mesh, value.shape.rank))

    def _grouped(self, value, missing):
        """`(N, ...)` -> `(R, n, ...)`, a group on every device."""
        if missing:
            # `Pad` is expanded only if operand and result have one layout.
            value = replicated(value, self._mesh)
            value = tf.pad(value, [[0, missing]] + [[0, 0]] * (value.shape.rank - 1))
            value = replicated(value, self._mesh)
        size = self._mesh.size
        shape = [size, value.shape[0] // size, *value.shape[1:]]
        value = tf.reshape(value, shape)
        return dtensor.relayout(value, sharded_layout(self._mesh, len(shape)))
