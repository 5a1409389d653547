"""Notices within a training call that an optimizer step has ended since the last."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

_INTEGERS = {2: tf.int16, 4: tf.int32, 8: tf.int64}
_here = threading.local()


@contextlib.contextmanager
def nothing_noted() -> Iterator[None]:
    """Inside, training calls of gates are no part of a step and leave no trace."""
    before, _here.only_looks = only_looks(), True
    try:
        yield
    finally:
        _here.only_looks = before


def only_looks() -> bool:
    """Whether the call is one within `nothing_noted`."""
    return getattr(_here, "only_looks", False)


@contextlib.contextmanager
def noted_later() -> Iterator[None]:
    """Inside, a gate's counts are not noted: they are those of one step of a loop.

    Replicas would have to sum them in the loop, where they cannot talk.
    """
    before, _here.notes_later = notes_later(), True
    try:
        yield
    finally:
        _here.notes_later = before


def notes_later() -> bool:
    """Whether the call is one within `noted_later`."""
    return getattr(_here, "notes_later", False)


class Tick(NamedTuple):
    """What a `StepClock` says to a call.

    Attributes:
        begins: `()` bool. Whether the call is the first of a step.
        ended: `()` bool. Whether a step has ended since the last training call: as
            `begins`, but False at the first call of all.
        num_steps: `()` int64. Steps that have ended since the clock was made.
    """

    begins: tf.Tensor
    ended: tf.Tensor
    num_steps: tf.Tensor


class StepClock:
    """Counts optimizer steps by what they do: a step ends when a weight has changed.

    A layer is called once a step, or several times: with gradient accumulation, where
    weights change in each n-th call, where it is shared, or unrolled over time. It
    does not know the optimizer, nor the loop that calls it. So the clock keeps a digest
    of one weight, and a step has ended when the weight no longer has it. It is a sum of
    the bits of the weight, in whole numbers: the same in whatever order it is added up,
    eagerly, compiled by XLA and on any device.

    A step that leaves the weight as it is, bit for bit, is not seen (a learning rate or
    a gradient of exactly 0, a step that loss scaling leaves out): it belongs to the
    next. If the weight is not trainable every call is a step.

    The state, `step_digest` and `num_steps`, are weights of the layer, in its files and
    checkpoints. It is written by `tick` alone: outside of training nothing is.

    Args:
        layer: The layer that asks; in its `build`.
        weight: A trainable weight of it, whole on every device, that every step
            changes.
    """

    def __init__(self, layer: keras.layers.Layer, weight: Any):
        self._weight = weight
        # `tf.train.Checkpoint` finds what is an attribute of the layer.
        layer._step_digest = self._digest = _counter(layer, "step_digest")
        layer._num_steps = self._num_steps = _counter(layer, "num_steps")

    @property
    def num_steps(self) -> tf.Tensor:
        """`()` int64: steps that had ended at the last training call."""
        return tf.convert_to_tensor(self._num_steps)

    def tick(self, inputs: tf.Tensor) -> Tick:
        """Looks at the weight, and remembers it for the next call. Only in training.

        Args:
            inputs: A tensor of the batch. At the end of a data set of unknown length
                Keras runs what does not depend on a batch once more.
        """
        with tf.control_dependencies([inputs]):
            before = tf.convert_to_tensor(self._digest)
            now, begins = tf.ones_like(before), tf.ones_like(before, tf.bool)
            if self._weight.trainable:
                now = _digest(tf.convert_to_tensor(self._weight))
                begins = before != now
            ended = begins & (before != 0)
            num_steps = self.num_steps + tf.cast(ended, tf.int64)
            self._digest.assign(now)
            self._num_steps.assign(num_steps)
        return Tick(begins, ended, num_steps)


def _counter(layer, name):
    return layer.add_weight(
        name=name, shape=(), initializer="zeros", dtype="int64", trainable=False
    )


def _digest(value):
    """`()` int64, never 0: the bits of a tensor, multiplied by fixed random numbers."""
    bits = tf.cast(tf.bitcast(value, _INTEGERS[value.dtype.size]), tf.int64)
    for axis in reversed(range(bits.shape.rank)):
        random = np.random.RandomState(axis)
        factors = random.randint(-(2**62), 2**62, bits.shape[axis], np.int64)
        bits = tf.reduce_sum(bits * (2 * factors + 1), axis=axis)
    return 2 * bits + 1
