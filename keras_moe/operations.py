"""How an operation is done where its stock form does not do: static shapes, GPUs.

An engine has one of these (`keras_moe.engine`); that of meshes overrides more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf


class Operations:
    """Operations in their stock form."""

    def products(self, x: tf.Tensor, kernels: Sequence[Any]) -> list[tf.Tensor]:
        """`(N, D)` by each of some kernels `(D, ...)` of rank 2."""
        return [tf.matmul(x, kernel) for kernel in kernels]

    def top_k(self, values: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
        """As `tf.math.top_k`."""
        return tf.math.top_k(values, k=k)

    def pick(self, values: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
        """Of each row of `(N, E)` the values at `(N, K)` indices."""
        return tf.gather(values, indices, batch_dims=1)

    def sum_by_expert(
        self, values: tf.Tensor, indices: tf.Tensor, num_experts: int
    ) -> tf.Tensor:
        """Sum of the values of each expert, `(E,)`; index -1 is left out."""
        # One small matrix product would need a dense (N, E) array; a segment sum
        # touches the K chosen gates only. Negative ids are dropped by the op.
        return tf.math.unsorted_segment_sum(
            tf.reshape(values, [-1]), tf.reshape(indices, [-1]), num_experts
        )

    def count_by_expert(self, indices: tf.Tensor, num_experts: int) -> tf.Tensor:
        """How often each expert occurs, `(E,)` int32; index -1 is left out."""
        ones = tf.ones_like(indices, tf.int32)
        return self.sum_by_expert(ones, indices, num_experts)

    def sum_of_rows(self, values: tf.Tensor) -> tf.Tensor:
        """`(N, E)` -> `(E,)`."""
        return tf.reduce_sum(values, axis=0)

    def largest_of_columns(self, values: tf.Tensor, m: tf.Tensor) -> tf.Tensor:
        """`(N, E)` bool: the m largest of each column; of equals the upper ones."""
        columns_EN = tf.transpose(values)
        num_experts, num_tokens = tf.unstack(tf.shape(columns_EN))
        _, tokens_Em = tf.math.top_k(columns_EN, k=tf.minimum(m, num_tokens))
        experts_Em = tf.zeros_like(tokens_Em) + tf.range(num_experts)[:, tf.newaxis]
        chosen = tf.reshape(tf.stack([tokens_Em, experts_Em], axis=-1), [-1, 2])
        # Indices are unique, so the scatter is deterministic.
        ones = tf.ones_like(chosen[:, 0])
        mask = tf.scatter_nd(chosen, ones, tf.stack([num_tokens, num_experts])) > 0
        return tf.ensure_shape(mask, values.shape)

    def over_columns(
        self,
        values: tf.Tensor,
        function: Callable[[tf.Tensor], tf.Tensor],
        filling: float,
    ) -> tf.Tensor:
        """Masks of columns that run over the rows of every replica.

        Args:
            values: `(N, E)` float, the rows of this replica.
            function: Maps whole columns, `(rows of all replicas, any number)`,
                to bool of that shape. The rows of a replica keep their order and
                follow those of the replicas before; rows of `filling` may stand
                between them.
            filling: Value of such rows.

        Returns:
            `(N, E)` bool, the rows of this replica. No gradient.
        """
        return function(tf.stop_gradient(values))

    def replicated(self, value: tf.Tensor) -> tf.Tensor:
        """The same tensor, laid out whole on every device."""
        return value

    def noise_of(self, noise: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        """Hands rows of noise, one a token, to the tokens that are real."""
        if mask is None:
            return noise
        # In int64, which a GPU adds; int32 would be added by the host.
        return tf.gather(noise, tf.cumsum(tf.cast(mask, tf.int64), exclusive=True))


class StaticOperations(Operations):
    """Operations whose shapes do not depend on the data, with kernels for GPUs.

    TensorFlow computes with int32 in the memory of the host even on a GPU; these count
    in floats and in int64. Sums are taken in a fixed order, where the stock scatter
    adds in any.
    """

    # Up to so many choices a token each is a pass over all experts, and up to so many
    # experts there is a column for each.
    most_passes = 16
    most_columns = 1024

    def products(self, x, kernels):
        # One product: x is read once, and its gradient written once.
        kernels = [tf.convert_to_tensor(kernel) for kernel in kernels]
        widths = [kernel.shape[1] for kernel in kernels]
        return tf.split(tf.matmul(x, tf.concat(kernels, axis=1)), widths, axis=1)

    def top_k(self, values, k):
        width = values.shape[-1]
        if width is None or k > self.most_passes:
            return super().top_k(values, k)

        @tf.custom_gradient
        def run(values):
            # A search of the largest for each place: sorting whole rows takes a GPU
            # many times as long. NaN counts as largest, as in the stock operation.
            # The search itself begins with the least number there is, at index 0.
            lowest = tf.constant(values.dtype.min / 2, values.dtype)
            keys = tf.maximum(values, lowest)
            keys = tf.where(tf.math.is_nan(values), values.dtype.max, keys)
            used = tf.constant(-np.inf, values.dtype)
            best, indices = [], []
            for _ in range(k):
                indices.append(tf.argmax(keys, axis=-1, output_type=tf.int64))
                is_it = tf.one_hot(indices[-1], width, on_value=True, off_value=False)
                zeros = tf.zeros([], values.dtype)
                best.append(tf.reduce_sum(tf.where(is_it, values, zeros), axis=-1))
                keys = tf.where(is_it, used, keys)
            indices = tf.stack(indices, axis=-1)

            def grad(d_best, _):
                return spread(d_best, indices, width)

            return (tf.stack(best, axis=-1), indices), grad

        best, indices = run(values)
        return best, tf.stop_gradient(indices)

    def pick(self, values, indices):
        width, k = values.shape[-1], indices.shape[-1]
        if k is None or k > self.most_passes:
            return super().pick(values, indices)

        @tf.custom_gradient
        def run(values):
            def grad(dy):
                return spread(dy, indices, width)

            return tf.gather(values, indices, batch_dims=1), grad

        return run(values)

    def sum_by_expert(self, values, indices, num_experts):
        if values.shape.rank == 1:
            values, indices = values[:, tf.newaxis], indices[:, tf.newaxis]
        indices, k = tf.cast(indices, tf.int64), values.shape[-1]
        if k is None or k > self.most_passes or num_experts > self.most_columns:
            flat = tf.reshape(values, [-1]), tf.reshape(indices, [-1])
            return tf.math.unsorted_segment_sum(*flat, num_experts)
        total = tf.zeros((num_experts,), values.dtype)
        for i in range(k):
            own = tf.one_hot(indices[..., i], num_experts, dtype=values.dtype)
            total += self.sum_of_rows(own * values[..., i, tf.newaxis])
        return total

    def count_by_expert(self, indices, num_experts):
        indices = tf.cast(indices, tf.int64)
        ones = tf.ones_like(indices, tf.float32)  # few enough to be exact
        return tf.cast(self.sum_by_expert(ones, indices, num_experts), tf.int32)

    def sum_of_rows(self, values):
        # Otherwise the gradient's shape would be made on the GPU, and waited for.
        return tf.squeeze(tf.reduce_sum(values, axis=0, keepdims=True), axis=0)

    def largest_of_columns(self, values, m):
        columns_EN = tf.transpose(values)
        order = tf.argsort(columns_EN, axis=-1, direction="DESCENDING", stable=True)
        # The inverse permutation, in types that a GPU sorts and compares.
        ranks = tf.argsort(tf.cast(order, tf.float32), axis=-1)
        return tf.transpose(tf.cast(ranks, tf.int64) < tf.cast(m, tf.int64))


def spread(values: tf.Tensor, indices: tf.Tensor, width: int) -> tf.Tensor:
    """`(N, K)` values at `(N, K)` indices -> `(N, width)`, zeros elsewhere.

    Values at one place are summed; index -1 is left out.
    """
    indices = tf.cast(indices, tf.int64)
    parts = [
        values[..., k, tf.newaxis]
        * tf.one_hot(indices[..., k], width, dtype=values.dtype)
        for k in range(values.shape[-1])
    ]
    return tf.add_n(parts)
