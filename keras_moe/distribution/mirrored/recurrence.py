"""A `keras.layers.RNN` whose cell draws noise, on replicas.

A row's noise goes by its place in the global batch, for which a replica asks the others.
Within its loop it cannot: TensorFlow knows an exchange by the name of the loop, which is
another one on each replica, and all would wait. So it asks before.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_moe import engine
from keras_moe.distribution import compatibility

_here = threading.local()
_installed = False


def rows_before() -> tf.Tensor | None:
    """Sequences on the replicas before this one, `()` int32; None outside of `noted`."""
    return getattr(_here, "rows", None)


@contextlib.contextmanager
def noted(rows: tf.Tensor) -> Iterator[None]:
    """Inside, `rows_before` is known, also to the loops there."""
    before, _here.rows = rows_before(), rows  # a replica is a thread
    try:
        yield
    finally:
        _here.rows = before


def install() -> None:
    """Lets `keras.layers.RNN` ask before its loop. The second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    stock = keras.layers.RNN.inner_loop

    @functools.wraps(stock)
    def inner_loop(self, sequences, initial_state, mask, training=False):
        if not (training and compatibility.moves_in_steps(self)):
            return stock(self, sequences, initial_state, mask, training)
        with engine.current().replicas.before_loop(tf.shape(sequences)[0]):
            return stock(self, sequences, initial_state, mask, training)

    keras.layers.RNN.inner_loop = inner_loop
