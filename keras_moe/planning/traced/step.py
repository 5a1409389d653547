"""The graph of a training step of a built model; nothing of it is run."""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_moe import runtime
from keras_moe.planning.traced.reduction import Marks, marked


@dataclasses.dataclass(frozen=True, eq=False)
class TracedStep:
    """A training step as a graph, and the variables in it.

    Attributes:
        graph: The function graph of TensorFlow.
        variables: All variables of the model, those of its seeds included.
        slots: Variables of the optimizer.
        others: Variables of metrics.
        marks: Which gradients devices sum.
    """

    graph: Any
    variables: list[Any]
    slots: list[Any]
    others: list[Any]
    marks: Marks


def trace_step(
    model: keras.Model, batch: tuple, optimizer: Any, shared: Collection[int] = ()
) -> TracedStep:
    """Traces a training step.

    Args:
        model: A built model, compiled or not. Without a loss the mean of squares
            of its outputs, with the losses of its layers, takes the place of one.
        batch: `(x, y)` of a compiled model, else `(x,)`: `tf.TensorSpec`, nested as
            the model takes them, of known shapes.
        optimizer: A `keras.optimizers.Optimizer` of its own, not built. Its state is
            in memory for as long as the result is.
        shared: `id`s of variables that devices share. Defaults to `()`.

    Returns:
        The `TracedStep`.

    Raises:
        ValueError: The step cannot be traced for such a batch.
    """
    optimizer.build(model.trainable_variables)
    step = model.train_step if model.compiled else _step_without_loss(model, optimizer)
    with (
        _optimizer_of(model, optimizer),
        said_of_batch(model, batch),
        marked(optimizer, shared) as marks,
    ):
        traced = tf.function(step, autograph=False, jit_compile=False)
        graph = traced.get_concrete_function(batch).graph
    metrics = [v for metric in getattr(model, "metrics", ()) for v in metric.variables]
    slots = list(optimizer.variables)
    return TracedStep(graph, list(model.variables), slots, metrics, marks)


def _step_without_loss(model, optimizer):
    def step(batch):
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(batch[0], training=True))
            parts = [tf.reduce_mean(y**2) for y in outputs if y.dtype.is_floating]
            loss = tf.add_n([*parts, *map(tf.convert_to_tensor, model.losses)])
        weights = model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in weights])
        found = [(g, v) for g, v in zip(gradients, weights, strict=True)]
        optimizer.apply_gradients([(g, v) for g, v in found if g is not None])
        return loss

    return step


@contextlib.contextmanager
def said_of_batch(model: Any, batch: Any) -> Iterator[None]:
    """Says of what goes wrong in a trace which batch it was traced for."""
    try:
        yield
    except (ValueError, TypeError, LookupError, tf.errors.OpError) as error:
        shapes = tf.nest.map_structure(lambda spec: tuple(spec.shape), batch)
        raise ValueError(
            f"`batch` must be what {model.name!r} trains on. Received: shapes {shapes}, "
            f"with which its step fails: {error}. Pass an example batch, or specs, as "
            "batch=(x, y)."
        ) from error


def _optimizer_of(model, optimizer):
    """Another optimizer in the place of the model's own."""
    compiled = [model] if model.compiled else []
    return runtime.attribute(compiled, "optimizer", optimizer)
