"""Recurrent states carried from batch to batch of a stream."""

import keras
import tensorflow as tf


class StreamState:
    """Variables that hold the states of recurrent layers between batches.

    There is one set for each batch size, so training and validation streams
    may differ. They are plain `tf.Variable`s outside Keras' tracking: states
    belong to a stream, not to the model, and are never saved with it.
    """

    def __init__(self):
        self._variables = {}

    def read(self, batch_size, initial_state):
        """The states for this batch size; `initial_state()` makes the first."""
        if batch_size not in self._variables:
            with tf.init_scope():  # out of the function that is being traced
                self._variables[batch_size] = tf.nest.map_structure(
                    lambda zeros: tf.Variable(zeros, trainable=False), initial_state()
                )
        return tf.nest.map_structure(
            lambda variable: variable.read_value(), self._variables[batch_size]
        )

    def write(self, batch_size, state):
        """Stores the states to go on with. No gradient goes further back."""
        for variable, value in zip(
            tf.nest.flatten(self._variables[batch_size]),
            tf.nest.flatten(state),
            strict=True,
        ):
            variable.assign(tf.stop_gradient(value))

    def reset(self):
        """Sets all states to zero."""
        for variable in tf.nest.flatten(self._variables):
            variable.assign(tf.zeros_like(variable))


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
