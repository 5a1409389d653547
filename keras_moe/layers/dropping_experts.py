"""Experts whose hidden units are dropped in training.

How a mask finds its row on every engine: see `functional.expert_dropout`.
"""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine
from keras_moe.functional.expert_dropout import (
    FUNCTION_PARTS,
    KEY_COLUMNS,
    dropping,
    functions_of,
    keys_of,
)
from keras_moe.layers.kernel_experts import KernelExperts
from keras_moe.layers.noise import draw_rows


class DroppingExperts(KernelExperts):
    """`KernelExperts` with dropout.

    Within their `network` `functional.expert_dropout.drop` takes `num_dropped_units`
    hidden units of a row, and drops some of them in training.

    Args:
        num_experts: Int. Number of experts.
        dropout: Float. Share of hidden units that are dropped.
        seed: Int or None.
        **kwargs: Those of `KernelExperts`.
    """

    def __init__(
        self, num_experts: int, *, dropout: float, seed: int | None, **kwargs: Any
    ):
        super().__init__(num_experts, **kwargs)
        self.dropout = checks.verify_rate(dropout, "dropout")
        self.seed = checks.verify_seed(seed)
        if self.dropout:
            self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def num_dropped_units(self) -> int:
        """Hidden units of one expert that `network` hands to `drop`, in all."""
        raise NotImplementedError

    def with_keys(
        self, rows: tf.Tensor, mask: tf.Tensor | None, training: bool | None
    ) -> tf.Tensor:
        """Rows with the columns that say which hidden units they keep, in training.

        Args:
            rows: `(..., features)`, with these columns or without.
            mask: `(N,)` bool or None. False where a row is not real.
            training: Whether hidden units are dropped.
        """
        if not (training and self.dropout) or self._has_keys(rows):
            return rows
        shape = tf.shape(rows)[:-1]
        number = rows.shape[0] if rows.shape.rank == 2 else None
        number = tf.reduce_prod(shape) if number is None else number
        uniform = draw_rows(
            number,
            KEY_COLUMNS,
            "float32",
            self.seed_generator,
            mask=mask,
            kind="uniform",
        )
        keys = tf.cast(keys_of(uniform), rows.dtype)
        if rows.shape.rank > 2:
            keys = tf.reshape(keys, tf.concat([shape, [KEY_COLUMNS]], axis=0))
        return tf.concat([rows, keys], axis=-1)

    def _has_keys(self, rows):
        return rows.shape[-1] == self.kernels[0].shape[1] + KEY_COLUMNS

    def values(self, rows):
        values = super().values(rows)
        if not self._has_keys(rows):
            return values
        here = engine.current()
        shape = (self.num_experts, FUNCTION_PARTS, self.num_dropped_units)
        uniform = keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)
        functions = functions_of(here.operations.replicated(uniform))
        return [*values, here.weights.entries_here(self.kernels[0], functions)]

    def call(self, inputs, counts=None, gates=None, plan=None, training=None):
        return super().call(
            self.with_keys(inputs, None, training),
            counts=counts,
            gates=gates,
            plan=plan,
        )

    def compute(self, rows, *weights):
        if not self._has_keys(rows):
            return super().compute(rows, *weights)
        functions, weights = weights[-1], weights[:-1]
        rows, keys = rows[..., :-KEY_COLUMNS], rows[..., -KEY_COLUMNS:]
        with dropping(keys, functions, self.dropout):
            return super().compute(rows, *weights)

    def get_config(self):
        return {**super().get_config(), "dropout": self.dropout, "seed": self.seed}
