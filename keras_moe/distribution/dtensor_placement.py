"""What layers ask of a mesh: weights with layouts, mixtures, static shapes."""

import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe import functional, placement
from keras_moe.distribution import compatibility, dtensor_exchange
from keras_moe.distribution.dtensor_variables import (
    LaidOutExperts,
    LaidOutVariable,
    in_step,
    on_host,
    sharded_layout,
)


class DTensorPlacement(placement.Placement):
    """Experts shared among the devices of a mesh; one logical replica.

    Args:
        mesh: A mesh of one axis.
    """

    static_shapes = True

    def __init__(self, mesh: dtensor.Mesh):
        self.mesh = mesh

    def add_expert_weight(self, layer, shape, initializer, name, together=1):
        if in_step():
            raise ValueError(
                "A layer with experts must be built before `strategy.run`, in the "
                f"scope of the strategy. Received: {layer.name!r} built within a "
                "step. Use `keras.Input`, or call `build` in `strategy.scope()`."
            )
        with compatibility.layer_name_scope(layer):
            variable = LaidOutExperts(
                initializer, shape, self.mesh, dtype=layer.variable_dtype, name=name
            )
        return compatibility.track_weight(layer, variable)

    def local_variable(self, value, shape):
        with tf.init_scope(), on_host():
            initial = tf.convert_to_tensor(value())
            rank = initial.shape.rank
            sharded = rank and initial.shape[0] % self.mesh.size == 0
            layout = (
                sharded_layout(self.mesh, rank)
                if sharded
                else dtensor.Layout.replicated(self.mesh, rank)
            )
            return LaidOutVariable(initial, layout=layout, trainable=False)

    def add_group_weight(self, layer, shape, initializer, name):
        # Gates are data-parallel here: every device has the gates of all groups.
        return layer.add_weight(name=name, shape=shape, initializer=initializer)

    # Within a step.

    def mix(self, layer, tokens, result, mask=None):
        experts = layer.experts
        weights = self._weights_of(experts)
        gates, chosen = result.gates, result.plan.expert_indices
        size, (num_tokens, k) = self.mesh.size, chosen.shape
        if isinstance(getattr(layer.gating, "k", None), int):
            k = layer.gating.k  # on average, where each token has other numbers
        real = chosen >= 0
        if mask is not None:
            real = real & mask[:, tf.newaxis]
        dtype = tf.as_dtype(experts.compute_dtype)
        missing = -num_tokens % size
        grouped = [
            self._grouped(each, missing)
            for each in (tf.cast(tokens, dtype), tf.cast(gates, dtype), chosen, real)
        ]
        tokens, gates, chosen, real = grouped
        choice = dtensor_exchange.make_choice(chosen, real, weights[0].shape[0])
        slots = dtensor_exchange.slot_numbers(tokens.shape[1], experts.num_experts, k)
        gates = tf.where(real, gates, tf.zeros_like(gates))
        num_kernels = len(experts.kernels)

        def network(rows, *weights):
            return functional.feed_forward_experts(
                rows,
                weights[:num_kernels],
                weights[num_kernels:] or None,
                activation=experts.activation,
            )

        outputs = dtensor_exchange.mix(
            tokens, gates, choice, network, weights, self.mesh, slots
        )
        outputs = tf.reshape(outputs, [-1, outputs.shape[-1]])
        if not missing:
            return outputs
        return self.replicated(self.replicated(outputs)[:num_tokens])

    def _weights_of(self, experts):
        variables = [*getattr(experts, "kernels", ()), *getattr(experts, "biases", ())]
        if not variables:
            raise ValueError(
                "`experts` must be FeedForwardExperts on a mesh, where all experts are "
                f"computed as one batched product. Received: {experts!r}. Use "
                "`tf.distribute.MirroredStrategy` or one device."
            )
        for variable in variables:
            if getattr(variable, "mesh", None) != self.mesh:
                raise ValueError(
                    "A layer must run under the strategy in whose scope it was built. "
                    f"Received: weight {variable.path!r} of another strategy or of "
                    "none, in a step on a mesh. Build the model in the scope of the "
                    "strategy and load its weights there."
                )
        dtype = tf.as_dtype(experts.compute_dtype)
        read = getattr(experts, "read", tf.convert_to_tensor)
        return [tf.cast(read(v), dtype) for v in variables]

    def _grouped(self, value, missing):
        """`(N, ...)` -> `(R, n, ...)`, a group on every device."""
        if missing:
            # `Pad` is expanded only if operand and result have one layout.
            value = self.replicated(value)
            value = tf.pad(value, [[0, missing]] + [[0, 0]] * (value.shape.rank - 1))
            value = self.replicated(value)
        size = self.mesh.size
        shape = [size, value.shape[0] // size, *value.shape[1:]]
        value = tf.reshape(value, shape)
        return dtensor.relayout(value, sharded_layout(self.mesh, len(shape)))

    def top_k(self, values, k):
        # The stock gradient scatters, which DTensor does on every device as a whole.
        width = values.shape[-1]

        @tf.custom_gradient
        def run(values):
            best, indices = tf.math.top_k(values, k)

            def grad(d_best, _):
                return _spread(d_best, indices, width)

            return (best, indices), grad

        # DTensor expands `TopKV2` wrongly if operand and result have different
        # layouts, which those of what comes before and after may ask for.
        best, indices = run(self._by_rows(values))
        return self._by_rows(best), self._by_rows(tf.stop_gradient(indices))

    def _by_rows(self, value):
        """With the rows sharded if the mesh divides their number, else replicated."""
        if value.shape[0] % self.mesh.size:
            return self.replicated(value)
        return dtensor.relayout(value, sharded_layout(self.mesh, value.shape.rank))

    def pick(self, values, indices):
        width = values.shape[-1]

        @tf.custom_gradient
        def run(values):
            def grad(dy):
                return _spread(dy, indices, width)

            return tf.gather(values, indices, batch_dims=1), grad

        return run(values)

    def sum_by_expert(self, values, indices, num_experts):
        total = tf.zeros((num_experts,), values.dtype)
        if values.shape.rank == 1:
            values, indices = values[:, tf.newaxis], indices[:, tf.newaxis]
        for k in range(values.shape[-1]):
            own = tf.one_hot(indices[..., k], num_experts, dtype=values.dtype)
            total += tf.reduce_sum(own * values[..., k, tf.newaxis], axis=0)
        return total

    def replicated(self, value):
        rank = value.shape.rank
        return dtensor.relayout(value, dtensor.Layout.replicated(self.mesh, rank))

    def over_columns(self, values, function, filling):
        # To the devices of the columns and back, where the stock way would sort
        # all columns on every device.
        values = tf.stop_gradient(values)
        num_tokens, num_experts = values.shape
        if num_tokens % self.mesh.size:
            return function(self.replicated(values))
        missing = -num_experts % self.mesh.size
        values = dtensor.relayout(values, sharded_layout(self.mesh, 2))
        padded = tf.pad(values, [[0, 0], [0, missing]], constant_values=filling)
        padded = dtensor.relayout(padded, sharded_layout(self.mesh, 2))
        columns = dtensor.relayout(padded, sharded_layout(self.mesh, 2, axis=1))
        mask = tf.cast(function(columns), tf.int32)
        mask = dtensor.relayout(mask, sharded_layout(self.mesh, 2, axis=1))
        mask = dtensor.relayout(mask, sharded_layout(self.mesh, 2))
        return mask[:, :num_experts] > 0

    def noise_of(self, noise, mask):
        # Told to be sharded, every device would draw numbers of its own.
        noise = self.replicated(noise)
        if mask is None:
            return noise
        before = tf.cumsum(tf.cast(self.replicated(mask), tf.int32), exclusive=True)
        return tf.gather(noise, before)


def _spread(values, indices, width):
    """`(N, K)` values at `(N, K)` indices -> `(N, width)`, zeros elsewhere."""
    parts = [
        values[..., k, tf.newaxis]
        * tf.one_hot(indices[..., k], width, dtype=values.dtype)
        for k in range(values.shape[-1])
    ]
    return tf.add_n(parts)
