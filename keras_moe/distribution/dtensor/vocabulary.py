"""Tables of a vocabulary whose words are shared out among the devices of a mesh.

A table is laid out along its axis of words. To look rows up DTensor would gather it whole,
and their gradients likewise. Here every device looks up the words that it has, within a
"parted" layout, in which a device runs an operation on what it holds (see `groups`).
"""

import functools
import os
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe.distribution.dtensor.groups import PASSED_ON
from keras_moe.distribution.dtensor.variables import (
    DENSE_BY,
    LaidOutExperts,
    LaidOutVariable,
    by_rows,
    on_host,
    replicated,
    sharded_layout,
)
from keras_moe.distribution.vocabulary import Vocabulary

_OPERATIONS = ("GATHERND", "TENSORSCATTERADD")


class LaidOutTable(LaidOutExperts):
    """A Keras variable with an axis of words, which the devices of a mesh share.

    Where the devices do not divide the words there are further ones of zeros, which are
    seen within a step only. Groups of devices have no copies of it.

    Args:
        initializer: Keras initializer of the whole table.
        shape: Of the whole table.
        mesh: The mesh.
        axis: That of the words. Defaults to 0.
        is_table: Whether it is a weight, and not the state of one. Defaults to `True`.
        **kwargs: Those of `keras.Variable`.
    """

    def __init__(
        self,
        initializer: Any,
        shape: tuple,
        mesh: dtensor.Mesh,
        *,
        axis: int = 0,
        is_table: bool = True,
        **kwargs: Any,
    ):
        self.axis = axis
        self.is_table = is_table
        super().__init__(initializer, shape, mesh, **kwargs)

    def sharded_alike(
        self, initializer: Any, shape: tuple, **kwargs: Any
    ) -> "LaidOutTable":
        """Another variable that is laid out as this one: its state."""
        sizes = list(shape)
        sizes[self.axis] = self.num_experts  # within a step it may be the stored one
        return LaidOutTable(
            initializer,
            tuple(sizes),
            self._mesh,
            axis=self.axis,
            is_table=False,
            **kwargs,
        )

    def _initialize_with_initializer(self, initializer):
        shape, dtype = tuple(self._shape), self._dtype
        with tf.init_scope(), on_host():
            self._value = LaidOutVariable(
                tf.convert_to_tensor(initializer(shape, dtype=dtype)),
                layout=sharded_layout(self._mesh, len(shape), self.axis),
                trainable=self.trainable,
                dtype=dtype,
                name=self.name,
            )

    @property
    def num_experts(self) -> int:
        """V, without padding."""
        return self._shape[self.axis]

    @property
    def num_copies(self) -> int:
        """1, whatever the groups of devices."""
        return 1


class MeshVocabulary(Vocabulary):
    """What a step on a mesh does with shared words.

    Args:
        mesh: The mesh.
        num_words: V.
    """

    def __init__(self, mesh: dtensor.Mesh, num_words: int):
        for name in _OPERATIONS:
            os.environ[PASSED_ON + name] = "1"
        self._mesh = mesh
        self._num_words = num_words
        self._size = -(-num_words // mesh.size)  # words of a device, with padding

    def _rows(self, tables, ids, leading):
        return self._looked_up(tables, ids, self._by_rows(leading))

    def common_rows(self, tables, ids):
        return self._looked_up(tables, ids, replicated)

    def agreed(self, values):
        # A random operation may have drawn others on each device.
        first = np.arange(self._mesh.size)[:, np.newaxis] == 0
        found = []
        for value in values:
            own = tf.reshape(replicated(value), [1, -1])
            of_all = own * self._along(first.astype(value.dtype.as_numpy_dtype))
            of_all = dtensor.relayout(of_all, self._layout(2))
            found.append(replicated(tf.reduce_sum(of_all, axis=0)))
        return found

    def _logits(self, inputs, kernel, bias, leading):
        by_rows = self._by_rows(leading)
        scores = self._scores(inputs, kernel, bias, by_rows)

        @tf.custom_gradient
        def run(scores):
            def grad(dy):
                missing = [[0, 0], [0, scores.shape[1] - self._num_words]]
                dy = by_rows(tf.pad(by_rows(dy), missing))
                return dtensor.relayout(dy, self._layout(2, 1))

            return by_rows(scores)[:, : self._num_words], grad

        return run(scores)

    def _cross_entropy(self, inputs, kernel, bias, targets, leading):
        scores = self._scores(inputs, kernel, bias, self._by_rows(leading))
        words = np.arange(self._size * self._mesh.size, dtype=np.int32)[np.newaxis]
        # Words of the padding cannot be.
        lowest = np.where(words < self._num_words, 0.0, -1e30)
        lowest = lowest.astype(scores.dtype.as_numpy_dtype)
        scores = scores + self._along(lowest, 1)
        targets = tf.reshape(replicated(tf.cast(targets, tf.int32)), [-1, 1])
        is_target = dtensor.relayout(
            tf.equal(self._along(words, 1), targets), self._layout(2, 1)
        )
        return _losses(dtensor.relayout(scores, self._layout(2, 1)), is_target)

    def _layout(self, rank, axis=0):
        return sharded_layout(self._mesh, rank, axis)

    def _along(self, array, axis=0):
        """A constant of which each device has its part."""
        constant = tf.constant(array)
        return dtensor.relayout(constant, self._layout(constant.shape.rank, axis))

    def _by_rows(self, leading):
        """How rows of so many parts of a batch are laid out: as the batch is."""
        if leading is None or leading % self._mesh.size:
            return replicated
        return functools.partial(by_rows, mesh=self._mesh)

    def _scores(self, inputs, kernel, bias, by_rows):
        """`(n, V)` with the padding, each device those of its words."""
        by_row = kernel.axis == 0
        words = tf.convert_to_tensor(kernel._value)
        given = [inputs, words]
        if bias is not None:
            given.append(tf.convert_to_tensor(bias._value))

        @tf.custom_gradient
        def run(inputs, words, *bias):
            rows = replicated(inputs)

            def grad(dy):
                dy = dtensor.relayout(dy, self._layout(2, 1))
                d_rows = tf.matmul(dy, words, transpose_b=not by_row)
                pair = (dy, rows) if by_row else (rows, dy)
                d_words = tf.matmul(*pair, transpose_a=True)
                d_words = dtensor.relayout(d_words, self._layout(2, kernel.axis))
                # Of the words of all devices.
                d_rows = by_rows(replicated(d_rows))
                d_bias = [
                    dtensor.relayout(tf.reduce_sum(dy, axis=0), self._layout(1))
                    for _ in bias
                ]
                return d_rows, d_words, *d_bias

            scores = tf.matmul(rows, words, transpose_b=by_row)
            for each in bias:
                scores = scores + each
            return dtensor.relayout(scores, self._layout(2, 1)), grad

        return run(*given)

    def _looked_up(self, tables, ids, by_rows):
        """Rows of each table for ids."""
        ids = replicated(tf.cast(ids, tf.int32))
        return [
            self._rows_of(tf.convert_to_tensor(t._value), ids, by_rows) for t in tables
        ]

    def _rows_of(self, table, ids, by_rows):
        features = table.shape[1:]

        def dense(slices):
            return self._sums_by_word(slices, table)

        @tf.custom_gradient
        def look_up(table):
            def grad(dy):
                # As for a table of one device, where norms are of rows as well.
                shape = tf.constant(table.shape.as_list(), tf.int64)
                setattr(shape, DENSE_BY, dense)
                return tf.IndexedSlices(replicated(dy), ids, shape)

            places, is_here = self._places(ids, table.dtype)
            found = tf.raw_ops.GatherNd(
                params=self._parted(self._by_device(table)), indices=places
            )
            found = dtensor.relayout(found, self._layout(3)) * is_here
            found = dtensor.relayout(found, self._layout(3))
            rows = replicated(tf.reduce_sum(found, axis=0))
            rows = tf.reshape(rows, [ids.shape[0], *features])
            return by_rows(rows), grad

        return look_up(table)

    def _sums_by_word(self, slices, table):
        """Slices of a gradient as a whole one, each device those of its words."""
        values = tf.reshape(replicated(slices.values), [1, slices.values.shape[0], -1])
        places, is_here = self._places(replicated(slices.indices), table.dtype)
        updates = dtensor.relayout(values * is_here, self._layout(3))
        sums = tf.raw_ops.TensorScatterAdd(
            tensor=self._parted(tf.zeros_like(self._by_device(table))),
            indices=places,
            updates=self._parted(updates),
        )
        sums = dtensor.relayout(sums, self._layout(3))
        return dtensor.relayout(
            tf.reshape(sums, table.shape), self._layout(table.shape.rank)
        )

    def _by_device(self, table):
        """`(Vp, ...)` -> `(R, Vp / R, D)`; nothing moves."""
        blocks = tf.reshape(table, [self._mesh.size, self._size, -1])
        return dtensor.relayout(blocks, self._layout(3))

    def _parted(self, value):
        return dtensor.relayout(value, self._layout(value.shape.rank).to_parted())

    def _places(self, ids, dtype):
        """Where each device finds ids among its words, and whether it has them.

        Args:
            ids: `(n,)` int32, replicated.
            dtype: Floating point type.

        Returns:
            places: `(R, n, 2)`, parted: 0, which is the device itself, and the word.
            is_here: `(R, n, 1)` of 0 and 1.
        """
        devices = np.arange(self._mesh.size, dtype=np.int32)[:, np.newaxis]
        local = tf.reshape(ids, [1, -1]) - self._along(devices * self._size)
        local = dtensor.relayout(local, self._layout(2))
        is_here = tf.logical_and(local >= 0, local < self._size)
        local = tf.clip_by_value(local, 0, self._size - 1)
        places = tf.stack([tf.zeros_like(local), local], axis=-1)
        places = dtensor.relayout(places, self._layout(3))
        is_here = tf.reshape(tf.cast(is_here, dtype), [self._mesh.size, -1, 1])
        return self._parted(places), dtensor.relayout(is_here, self._layout(3))


@tf.custom_gradient
def _losses(scores, is_target):
    """Cross-entropies `(n,)` of scores `(n, V)` that are sharded along the words."""
    highest = replicated(tf.reduce_max(scores, axis=1, keepdims=True))
    total = tf.reduce_sum(tf.exp(scores - highest), axis=1, keepdims=True)
    normalizer = highest + tf.math.log(replicated(total))
    scored = tf.where(is_target, scores, tf.zeros_like(scores))
    scored = replicated(tf.reduce_sum(scored, axis=1))

    def grad(dy):
        dy = tf.reshape(replicated(dy), [-1, 1])
        softmax = tf.exp(scores - normalizer)
        return (softmax - tf.cast(is_target, scores.dtype)) * dy, None

    return tf.reshape(normalizer, [-1]) - scored, grad
