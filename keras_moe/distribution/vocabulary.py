"""What layers do with tables whose words live on several devices, on either engine."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


class SharesWords:
    """Of an engine of several devices: whether they share the words of vocabularies out.

    Attributes:
        shards_vocabulary: Whether they do.
        has_tables: Whether any table has been made so far.
    """

    shards_vocabulary = has_tables = False

    def shard_vocabulary(self) -> None:
        """Shares words out, of tables that are made from here on.

        Raises:
            ValueError: A table was made before, of which every device has all words.
        """
        if self.has_tables and not self.shards_vocabulary:
            raise ValueError(
                "`shard_vocabulary` must be called before layers with a vocabulary are "
                "built in the scope of the strategy. Received: a call after one was "
                "built, of which every device has all words. Call it right after making "
                "the strategy."
            )
        self.shards_vocabulary = True


class Vocabulary:
    """Tables of V words, of which each device has a run.

    All tables of a call have their words in the same places. Gradients of a word go to
    its device, and to no other.
    """

    def rows(self, tables: Sequence[Any], ids: tf.Tensor) -> list[tf.Tensor]:
        """Rows of tables, for ids that each device has for itself.

        Args:
            tables: Variables `(V, ...)`, from `add_table_weight`.
            ids: Ints of any shape.

        Returns:
            `(*ids.shape, ...)` of each table.
        """
        found = self._rows(tables, tf.reshape(ids, [-1]), ids.shape[0])
        return [
            tf.ensure_shape(
                tf.reshape(rows, tf.concat([tf.shape(ids), rows.shape[1:]], axis=0)),
                (*ids.shape, *rows.shape[1:]),
            )
            for rows in found
        ]

    def common_rows(self, tables: Sequence[Any], ids: tf.Tensor) -> list[tf.Tensor]:
        """As `rows`, for `(n,)` ids that are alike on all devices."""
        raise NotImplementedError

    def agreed(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Those of the first device, for all. No gradient."""
        raise NotImplementedError

    def logits(self, inputs: tf.Tensor, kernel: Any, bias: Any = None) -> tf.Tensor:
        """Scores of all words, for the rows of this device.

        Args:
            inputs: `(..., D)` of the type of the kernel.
            kernel: Variable `(V, D)`, or `(D, V)` if that is its axis of words.
            bias: Variable `(V,)` or None. Defaults to `None`.

        Returns:
            `(..., V)`.
        """
        rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
        scores = self._logits(rows, kernel, bias, inputs.shape[0])
        size = scores.shape[-1]
        scores = tf.reshape(scores, [*tf.unstack(tf.shape(inputs))[:-1], size])
        return tf.ensure_shape(scores, (*inputs.shape[:-1], size))

    def cross_entropy(
        self, inputs: tf.Tensor, kernel: Any, bias: Any, targets: tf.Tensor
    ) -> tf.Tensor:
        """`functional.cross_entropy` of `logits`, which no device has as a whole.

        Args:
            inputs: `(..., D)` of the type of the kernel.
            kernel: As for `logits`.
            bias: Likewise.
            targets: Ints of the leading dimensions.

        Returns:
            Losses of the leading dimensions.
        """
        rows = tf.reshape(inputs, [-1, inputs.shape[-1]])
        targets = tf.reshape(targets, [-1])
        losses = self._cross_entropy(rows, kernel, bias, targets, inputs.shape[0])
        return tf.reshape(losses, tf.shape(inputs)[:-1])

    # Of rows that were put one after the other, and of how many parts, if that is known.

    def _rows(self, tables, ids, leading):
        raise NotImplementedError

    def _logits(self, inputs, kernel, bias, leading):
        raise NotImplementedError

    def _cross_entropy(self, inputs, kernel, bias, targets, leading):
        raise NotImplementedError
