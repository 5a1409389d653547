"""Tables of a vocabulary whose words are shared out among the replicas.

No table, and no gradient of one, travels: ids go to all replicas, and rows, or what a
softmax says of its words, come back. Replicas may have different numbers of rows: they
are padded to the most of any.
"""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_moe.distribution.mirrored import exchange
from keras_moe.distribution.topology import Shards
from keras_moe.distribution.vocabulary import Vocabulary
from keras_moe.functional import ops


class ShardedVocabulary(Vocabulary):
    """What the replica whose code runs here does, with the others.

    Args:
        replicas: The `engine.Replicas`.
        shards: Which replica has which words.
    """

    def __init__(self, replicas: Any, shards: Shards):
        self._replicas = replicas
        self._shards = shards

    @property
    def _own(self) -> range:
        """The words that live here."""
        return self._shards.experts_of(self._replicas.index)

    def _rows(self, tables, ids, leading):
        # What is below 0 is no word, and not padding either.
        ids = tf.where(ids < 0, tf.cast(self._shards.num_experts, ids.dtype), ids)
        ids, length = self._padded(ids, -1)
        all_ids = self._replicas.gather(ids)  # (R, L)
        found, sizes = self._found(tables, all_ids)
        # Of each id one replica has the row, the others have zeros.
        return _split(self._sum_of_blocks(found)[:length], tables, sizes)

    def common_rows(self, tables, ids):
        found, sizes = self._found(tables, ids[tf.newaxis])
        return _split(self._replicas.sum(found[0]), tables, sizes)

    def agreed(self, values):
        return [self._replicas.gather(value)[0] for value in values]

    def _logits(self, inputs, kernel, bias, leading):
        inputs, length = self._padded(inputs)
        scores = _scores(self._of_all(inputs), *self._parts(kernel, bias))
        sizes = self._shards.sizes
        missing = int(sizes.max()) - scores.shape[-1]
        blocks = tf.pad(scores, [[0, 0], [0, missing]])
        blocks = tf.reshape(blocks, [self._replicas.number, -1, int(sizes.max())])
        # The scores of the own rows, as each replica has them of its words.
        blocks = tf.unstack(self._replicas.exchange(blocks))
        parts = [
            block[:, :size] for block, size in zip(blocks, map(int, sizes), strict=True)
        ]
        return tf.concat(parts, axis=-1)[:length]

    def _cross_entropy(self, inputs, kernel, bias, targets, leading):
        inputs, length = self._padded(inputs)
        targets, _ = self._padded(targets, -1)
        all_targets = tf.reshape(self._replicas.gather(targets), [-1])
        own_kernel, own_bias = self._parts(kernel, bias)
        losses = self._losses(self._of_all(inputs), own_kernel, own_bias, all_targets)
        return tf.reshape(losses, [self._replicas.number, -1])[self._replicas.index][
            :length
        ]

    def _padded(self, value, filling=0):
        """To the length of the longest on any replica, and the length here."""
        length = tf.shape(value)[0]
        longest = tf.maximum(tf.reduce_max(self._replicas.gather(length)), 1)
        rest = [[0, longest - length], *[[0, 0]] * (value.shape.rank - 1)]
        return tf.pad(value, rest, constant_values=filling), length

    def _found(self, tables, ids):
        """Rows of the words that live here, side by side, and zeros for others.

        Args:
            tables: Variables `(V, ...)`.
            ids: `(R, L)`.

        Returns:
            `(R, L, D)`, and the features of each table, whose sum is D.
        """
        ids, own = tf.cast(ids, tf.int32), self._own
        is_here = self._is_here(ids)
        places = tf.reshape(tf.where(tf.reshape(is_here, [-1])), [-1])
        places = tf.cast(places, tf.int32)
        numbers = tf.cumsum(tf.cast(tf.reshape(is_here, [-1]), tf.int32)) - 1
        slots = tf.where(is_here, tf.reshape(numbers, tf.shape(ids)), -1)
        local = tf.gather(tf.reshape(ids, [-1]), places) - own.start
        found, sizes = [], []
        for table in tables:
            rows = tf.gather(table.part_of_replica(), local)
            sizes.append(math.prod(rows.shape[1:]))
            found.append(tf.reshape(rows, [-1, sizes[-1]]))
        return exchange.moved(tf.concat(found, axis=1), slots, places), sizes

    def _is_here(self, ids):
        """Of int32 ids which are those of words that live here."""
        own = self._own
        if own and own.stop == self._shards.num_experts:
            # Where the last words live, ids that are no words are looked up, and raise.
            return ids >= own.start
        return tf.logical_and(ids >= own.start, ids < own.stop)

    def _sum_of_blocks(self, blocks):
        """`(R, L, D)` -> `(L, D)`: block r of all replicas, on replica r."""
        return tf.reduce_sum(self._replicas.exchange(blocks), axis=0)

    def _of_all(self, rows):
        """`(L, D)` of each replica -> `(R * L, D)`; its gradient sums their blocks."""
        number, features = self._replicas.number, rows.shape[-1]

        @tf.custom_gradient
        def run(rows):
            def grad(dy):
                return self._sum_of_blocks(tf.reshape(dy, [number, -1, features]))

            return tf.reshape(self._replicas.gather(rows), [-1, features]), grad

        return run(rows)

    def _parts(self, kernel, bias):
        """Those of this replica: kernel `(D, v)` and bias `(v,)`."""
        part = tf.convert_to_tensor(kernel.part_of_replica())
        part = part if kernel.axis == 1 else tf.transpose(part)
        if bias is None:
            return part, tf.zeros((part.shape[1],), part.dtype)
        return part, tf.convert_to_tensor(bias.part_of_replica())

    def _losses(self, inputs, kernel, bias, targets):
        """Cross-entropies of the rows of all replicas, alike on all of them.

        Only the scores of own words, `(N, v)`, are made, once forward and once backward.

        Args:
            inputs: `(N, D)`.
            kernel: `(D, v)`.
            bias: `(v,)`.
            targets: `(N,)` int, -1 for a row that is padding.

        Returns:
            `(N,)`. Gradients of rows are those of the words here, to be summed.
        """
        targets = tf.cast(targets, tf.int32)
        places = tf.cast(tf.where(self._is_here(targets))[:, 0], tf.int32)
        local = tf.gather(targets, places) - self._own.start
        cells = tf.stack([places, local], axis=1)

        def run(inputs, kernel, bias):
            scores = _scores(inputs, kernel, bias)
            highest = tf.reduce_max(scores, axis=1)
            # Without words, or with words that cannot be, there is no highest one.
            highest = tf.where(tf.math.is_finite(highest), highest, 0.0)
            total = tf.reduce_sum(tf.exp(scores - highest[:, tf.newaxis]), axis=1)
            scored = tf.zeros_like(total)
            scored = tf.tensor_scatter_nd_update(
                scored, places[:, tf.newaxis], tf.gather_nd(scores, cells)
            )
            told = self._replicas.gather(tf.stack([highest, total, scored]))
            highests, totals, scoreds = tf.unstack(told, axis=1)  # (R, N) each
            highest = tf.reduce_max(highests, axis=0)
            total = tf.reduce_sum(totals * tf.exp(highests - highest), axis=0)
            normalizer = highest + tf.math.log(total)

            def grad(dy):
                # Each replica makes a loss of its own rows.
                dy = self._replicas.sum(dy)
                found = tf.exp(_scores(inputs, kernel, bias) - normalizer[:, None])
                found = ops.add_at(
                    found * dy[:, tf.newaxis], cells, -tf.gather(dy, places)
                )
                return (
                    tf.matmul(found, kernel, transpose_b=True),
                    tf.matmul(inputs, found, transpose_a=True),
                    tf.reduce_sum(found, axis=0),
                )

            return normalizer - tf.reduce_sum(scoreds, axis=0), grad

        return tf.custom_gradient(run)(inputs, kernel, bias)


def _scores(inputs, kernel, bias):
    return tf.matmul(inputs, kernel) + bias


def _split(rows: tf.Tensor, tables: Sequence[Any], sizes: Sequence[int]):
    """Rows of each table, in its shape, of rows side by side."""
    parts = tf.split(rows, sizes, axis=1)
    shapes = [table.shape[1:] for table in tables]
    return [
        tf.reshape(part, [-1, *shape])
        for part, shape in zip(parts, shapes, strict=True)
    ]
