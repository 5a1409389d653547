"""Experts that are Keras layers of any kind, each run on one replica of a strategy.

Their variables are those of Keras: every replica holds all of them. An expert runs on
all rows of the global batch on one replica, to which they travel; so batch statistics
and random numbers are those of one device. The other replicas call it on no rows: they
trace the same layer, so that all know which state it writes. What the owner writes,
moving averages for example, is then told to all, by one exchange. The gradients of an
expert are those of its owner, zero elsewhere, and are summed as those of other weights.
"""

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe.distribution import compatibility
from keras_moe.distribution.mirrored.expert_variable import ExpertVariable
from keras_moe.distribution.mirrored.optimization import part_here
from keras_moe.distribution.topology import Shards

_running = threading.local()  # replicas are threads


@contextlib.contextmanager
def rows_of(shards: Shards):
    """A context in which rows are all those of the experts of this replica."""
    before, _running.shards = getattr(_running, "shards", None), shards
    try:
        yield
    finally:
        _running.shards = before


def run_each(
    replicas: Any,
    owner: Any,
    experts: Sequence[Any],
    calls: Sequence[Callable[[], tf.Tensor]],
) -> list[tf.Tensor]:
    """Calls experts, each on its rows.

    Args:
        replicas: The `engine.Replicas`.
        owner: The layer whose experts they are.
        experts: Keras layers.
        calls: For each of them what calls it.

    Returns:
        The answers.
    """
    shards = getattr(_running, "shards", None)
    if shards is None:  # called by itself: each replica has rows of its own
        return [call() for call in calls]
    here = shards.experts_of(replicas.index)
    answers, losses, written, told = [], [], [], []
    with rows_of(None):  # type: ignore[arg-type]
        for index, (expert, call) in enumerate(zip(experts, calls, strict=True)):
            with keras.StatelessScope(collect_losses=True) as scope:
                outputs = call()
            is_here = index in here
            if not (is_here or _talks(expert)):
                outputs = _without_gradient(outputs, expert)
            answers.append(outputs)
            share = 1.0 if is_here else 0.0
            losses += [share * loss for loss in scope.losses or ()]
            for variable in _state_of(expert):
                value = scope.get_current_value(variable)
                if value is None:
                    continue
                if _is_of_replica(variable):
                    part_here(variable).assign(value)
                else:
                    written.append(variable)
                    told.append(value if is_here else tf.zeros_like(value))
    sums = _summed(replicas, [*told, *losses])
    for variable, value in zip(written, sums, strict=False):
        part_here(variable).assign(value)
    for loss, total in zip(losses, sums[len(told) :], strict=True):
        # Keras divides the losses of a step by the number of replicas, and reports
        # their mean: the value is that of all on each.
        loss *= replicas.number
        owner.add_loss(loss + tf.stop_gradient(total - loss))
    return answers


def _talks(expert):
    """Whether the replicas exchange something within it, also in its gradient."""
    layers = list(expert._flatten_layers())
    return any(getattr(layer, "synchronized", False) for layer in layers) or any(
        isinstance(v, ExpertVariable) for v in expert.weights
    )


def _without_gradient(outputs, expert):
    """No rows: the gradient of the weights is zero, whatever that of a zero row is."""
    weights = [v.value for v in expert.trainable_variables]

    @tf.custom_gradient
    def run(outputs, *weights):
        def grad(dy):
            return dy, *(tf.zeros_like(weight) for weight in weights)

        return tf.identity(outputs), grad

    return run(tf.stop_gradient(outputs), *map(tf.convert_to_tensor, weights))


def _state_of(expert):
    """Its variables, those of generators of random numbers and metrics too."""
    every = [*expert.variables, *expert.metrics_variables]
    return {id(v): v for v in every}.values()


def _is_of_replica(variable):
    """Whether every replica keeps a value of its own, a part of a sum for example."""
    return isinstance(variable._value, compatibility.SyncOnReadVariable)


def _summed(replicas, values):
    """Sums over the replicas, by one exchange. In float64, which holds all of them."""
    if not values:
        return []
    flat = [tf.reshape(tf.cast(v, tf.float64), [-1]) for v in values]
    flat = tf.stop_gradient(tf.concat(flat, axis=0))
    sizes = [v.shape.num_elements() for v in values]
    parts = tf.split(replicas.sum(flat), sizes)
    return [
        tf.cast(tf.reshape(part, v.shape), v.dtype)
        for part, v in zip(parts, values, strict=True)
    ]
