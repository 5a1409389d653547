"""Recurrent states carried from batch to batch of a stream."""

from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_moe import engine

_ONE_SIZE = (
    "A stateful MoELanguageModel needs batches of one size within a stream. "
    "Received: rows of the batch before and of this one"
)


class StreamState:
    """Variables that hold the states of recurrent layers between batches.

    They are outside Keras' tracking: states belong to a stream, not to the model,
    and are never saved with it. Their number of rows is that of the stream's first
    batch. On several devices each carries the states of its own rows.
    """

    def __init__(self):
        # For each replica whether a stream has started, and its states.
        self._started: dict[Any, Any] = {}
        self._variables: dict[Any, list] = {}

    def read(self, initial_state):
        """The states to go on with, or `initial_state` at the start of a stream."""
        zeros = tf.nest.flatten(initial_state)
        replica, here = engine.current_replica(), engine.current()
        if not here.values_are_here:
            return tf.nest.pack_sequence_as(initial_state, self._read_static(zeros))
        if replica not in self._started:
            self._started[replica] = here.weights.local_variable(lambda: False, ())
            self._variables[replica] = [
                here.weights.local_variable(
                    partial(tf.zeros, (0, each.shape[-1]), each.dtype),
                    (None, each.shape[-1]),
                )
                for each in zeros
            ]
        # Not told from the number of rows: TensorFlow's graph optimizer infers
        # that number from the shapes that follow, and takes the wrong branch.
        started = self._started[replica].read_value()
        state = [
            _carried_or_zero(started, variable.read_value(), each)
            for variable, each in zip(self._variables[replica], zeros, strict=True)
        ]
        return tf.nest.pack_sequence_as(initial_state, state)

    def _read_static(self, zeros):
        """The same where shapes are static: each number of rows has variables."""
        here, rows = engine.current(), zeros[0].shape[0]
        if rows not in self._started:
            self._started[rows] = here.weights.local_variable(lambda: False, ())
            self._variables[rows] = [
                here.weights.local_variable(
                    partial(tf.zeros, each.shape, each.dtype), each.shape
                )
                for each in zeros
            ]
        others = [
            tf.debugging.Assert(tf.logical_not(started.read_value()), [_ONE_SIZE, rows])
            for other, started in self._started.items()
            if other != rows
        ]
        with tf.control_dependencies([check for check in others if check is not None]):
            started = tf.identity(self._started[rows].read_value())
        # Not a scalar condition: DTensor crashes on one beside sharded operands.
        return [
            tf.where(
                tf.ones_like(each) * tf.cast(started, each.dtype) > 0,
                variable.read_value(),
                each,
            )
            for variable, each in zip(self._variables[rows], zeros, strict=True)
        ]

    def write(self, state):
        """Stores the states to go on with. No gradient goes further back."""
        replica = engine.current_replica()
        if not engine.current().values_are_here:
            replica = tf.nest.flatten(state)[0].shape[0]
        self._started[replica].assign(True)
        for variable, value in zip(
            self._variables[replica], tf.nest.flatten(state), strict=True
        ):
            variable.assign(tf.stop_gradient(value))

    def reset(self):
        """Marks the start of a stream."""
        for started in self._started.values():
            started.assign(False)


def _carried_or_zero(started, carried, zeros):
    rows, batch_size = tf.shape(carried)[0], tf.shape(zeros)[0]
    same_size = tf.debugging.Assert(
        tf.logical_not(started) | (rows == batch_size),
        [
            _ONE_SIZE,
            rows,
            batch_size,
            "Use `TextCorpus.dataset`, batch with drop_remainder=True, call "
            "`reset_state()` between streams, or set `stateful` to False.",
        ],
    )
    with tf.control_dependencies([] if same_size is None else [same_size]):
        state = tf.cond(started, lambda: carried, lambda: zeros)
    state.set_shape(zeros.shape)
    return state


class ResetAtEpochBegin(keras.callbacks.Callback):
    """Starts every epoch of a stateful model at the beginning of its stream."""

    @classmethod
    def added_to(cls, callbacks):
        """`callbacks` (None, one, a list or a `CallbackList`) and this one."""
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(cls())
            return callbacks
        if callbacks is None:
            callbacks = []
        elif not isinstance(callbacks, (list, tuple)):
            callbacks = [callbacks]
        return [*callbacks, cls()]

    def on_epoch_begin(self, epoch, logs=None):
        self.model.reset_state()
