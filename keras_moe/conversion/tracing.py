"""Which layers of a model feed which: read off one trace of it.

Layers may be called by a functional graph, by a `Sequential`, or by lines of Python in
the `call` of another layer or model. A TensorFlow graph of the whole shows all of them
alike, and who takes a tensor.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class Call(NamedTuple):
    """One call of a layer in a trace.

    Attributes:
        place: Its place among the calls.
        layer: The layer.
        inputs: Its first argument.
        outputs: What it returned, which may be its input itself.
        first_operation, last_operation: Its operations are those of the graph from
            the one index up to, and without, the other.
    """

    place: int
    layer: Any
    inputs: tf.Tensor
    outputs: tf.Tensor
    first_operation: int
    last_operation: int


class Trace(NamedTuple):
    """Calls of some layers of a model in one trace of it.

    Attributes:
        calls: List of `Call`, in their order.
        graph: The graph of the model.
        outputs: Tensors that the model returns.
    """

    calls: list[Call]
    graph: Any
    outputs: list[tf.Tensor]

    def of(self, layer: Any) -> list[Call]:
        """The calls of one layer."""
        return [call for call in self.calls if call.layer is layer]

    def next_after(self, tensor: tf.Tensor, before: Call) -> Call | None:
        """The call that is the only one to take a tensor, or None.

        Args:
            tensor: What a call returned.
            before: That call.
        """
        if tensor.graph is not self.graph or any(tensor is o for o in self.outputs):
            return None
        later = self.calls[before.place + 1 :]
        takers = [call for call in later if call.inputs is tensor]
        if not takers:
            return None
        taker = takers[0]
        if taker.outputs is tensor:  # a dropout that drops nothing
            return taker
        operations = self.graph.get_operations()
        its_own = operations[taker.first_operation : taker.last_operation]
        own_names = {operation.name for operation in its_own}
        if {consumer.name for consumer in tensor.consumers()} <= own_names:
            return taker
        return None


def trace(
    model: Any, inputs: Any, layers: Iterable, instead: Callable | None = None
) -> Trace:
    """Traces a model as in inference, and notes the calls of some of its layers.

    Args:
        model: A built layer or model.
        inputs: Structure of specs for its first argument, anything with a shape and
            dtype.
        layers: Layers whose calls are noted.
        instead: `instead(layer, inputs)` gives what a layer returns, which is not
            called then. Defaults to `None`: it is.

    Returns:
        The `Trace`.
    """
    calls: list[Call] = []
    outputs: list[Any] = []

    def run(tensors):
        with _noted(layers, calls, instead):
            result = model(tensors)
        outputs.extend(keras.tree.flatten(result))
        return [x for x in outputs if x is not None]

    specs = keras.tree.map_structure(_spec, inputs)
    function = tf.function(run, autograph=False).get_concrete_function(specs)
    return Trace(calls, function.graph, outputs)


def _spec(x):
    shape = [axis if isinstance(axis, int) else None for axis in x.shape]
    return tf.TensorSpec(shape, tf.as_dtype(keras.backend.standardize_dtype(x.dtype)))


@contextlib.contextmanager
def _noted(layers, calls, instead) -> Iterator[None]:
    """Notes calls of layers in the `with` block."""
    layers = list({id(layer): layer for layer in layers}.values())
    for layer in layers:
        layer.call = _noting(layer, layer.call, calls, instead)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call


def _noting(layer, call, calls, instead):
    @functools.wraps(call)
    def noting(*args, **kwargs):
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        graph = tf.compat.v1.get_default_graph()
        first = len(graph.get_operations())
        outputs = instead(layer, inputs) if instead else call(*args, **kwargs)
        last = len(graph.get_operations())
        calls.append(Call(len(calls), layer, inputs, outputs, first, last))
        return outputs

    return noting
