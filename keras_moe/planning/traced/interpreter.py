"""A graph as a list of steps with the sizes of what they take and give."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_moe.planning.traced import operations, reduction
from keras_moe.planning.traced.inference import OF_SHAPES, Inference
from keras_moe.planning.traced.liveness import simulate
from keras_moe.planning.traced.values import Value

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_LOOPS = {"While", "StatelessWhile"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}
_STACKS = {"ConcatV2", "Pack", "ParallelConcat"}


@dataclasses.dataclass(eq=False)
class Node:
    """One operation of a step.

    Attributes:
        name: Str. Name of the operation in its graph.
        kind: Str. Type of the operation.
        inputs: Its inputs.
        outputs: Its results; those in a buffer of another have a `root`.
        after: Nodes that it waits for besides those of its inputs.
        takes_over: Inputs whose buffer the first result may take.
        temporary: Int. Bytes that it takes while it runs.
        multiply_adds: Int.
        is_loop: Bool. Whether what it takes shrinks while what it gives grows.
    """

    name: str
    kind: str
    inputs: list[Value]
    outputs: list[Value]
    after: list["Node"]
    takes_over: Sequence[int] = ()
    temporary: int = 0
    multiply_adds: int = 0
    is_loop: bool = False


class Interpreter:
    """Walks through a graph and the functions that it calls.

    Attributes:
        nodes: All operations that run, each after those that it needs.
        tensors: The values of the outermost graph by the name of their tensor.
        assumed: Types of operations with results of a size that was assumed.

    Args:
        inference: Which remembers results. Defaults to one of its own.
        summing: Devices that sum gradients. Defaults to a single one, which does not.
        of_experts: As `reduction.Marks` has it.
    """

    def __init__(
        self,
        inference: Inference | None = None,
        summing: reduction.Reduction | None = None,
        of_experts: Mapping[str, list[bool]] | None = None,
    ):
        self.nodes: list[Node] = []
        self.tensors: dict[str, Value] = {}
        self._inference = inference or Inference()
        self._summing = summing or reduction.Reduction()
        self._of_experts = of_experts or {}

    @property
    def assumed(self) -> set[str]:
        """Types of operations with results of a size that was assumed."""
        return self._inference.assumed

    def run(
        self, graph: Any, inputs: Sequence[Value], after: Sequence[Node] = ()
    ) -> list:
        """Walks through a function graph.

        Args:
            graph: A graph of TensorFlow with `inputs` and `outputs`.
            inputs: A `Value` for each of its inputs, captured ones included.
            after: What the graph waits for. Defaults to `()`.

        Returns:
            A `Value` for each output.
        """
        values: dict[str, Value] = {} if self.tensors else self.tensors
        for tensor, value in zip(graph.inputs, inputs, strict=True):
            values[tensor.name] = value
        last: dict[str, list[Node]] = {}
        for op in _needed(graph):
            if op.type == "Placeholder" and op.outputs[0].name in values:
                last[op.name] = list(after)
                continue
            own = [values[t.name] for t in op.inputs]
            waits = [n for c in op.control_inputs for n in last.get(c.name, ())]
            first = len(self.nodes)
            results = self._results(graph, op, own, waits or list(after))
            last[op.name] = self.nodes[first:][-1:] or waits
            for tensor, value in zip(op.outputs, results, strict=True):
                values[tensor.name] = value
        return [values[t.name] for t in graph.outputs]

    def _results(self, graph, op, inputs, after):
        if reduction.is_of_gradients(op):
            return self._summed(op, inputs, after)
        if op.type == "IdentityN":  # TensorFlow passes each of them on by itself
            return inputs
        if reduction.is_of_rows(op):
            return self._gathered(op, inputs[0], after)
        if op.type in _CALLS:
            return self.run(_function(graph, op, "f"), inputs, after)
        if op.type in _LOOPS:
            return self._loop(graph, op, inputs, after)
        if op.type in _BRANCHES:
            return self._branch(graph, op, inputs, after)
        if op.type == "ReadVariableOp":
            outputs = [dataclasses.replace(inputs[0].variable, root=inputs[0].variable)]
        elif op.type == "VariableShape":
            shape = inputs[0].variable.shape
            outputs = [Value((len(shape),), tf.int32, np.array(shape, np.int32))]
        elif op.type.startswith("TensorList") or op.type == "EmptyTensorList":
            outputs = self._list(op, inputs)
        else:
            if op.type in ("ResourceGather", "ResourceGatherNd"):
                inputs = [inputs[0].variable, *inputs[1:]]
            outputs = self._inference.results(op, inputs)
        shared = operations.shared_with(op, inputs, outputs)
        for value, source in zip(outputs, shared, strict=True):
            if source is not None:
                value.root, value.entries = inputs[source], inputs[source].entries
        reads = [] if op.type in OF_SHAPES else inputs  # shapes are known beforehand
        self._add(
            op,
            reads,
            outputs,
            after,
            takes_over=operations.may_take_over(op),
            multiply_adds=operations.multiply_adds(op, inputs, outputs),
        )
        return outputs

    def _summed(self, op, gradients, after):
        """Gradients of all devices, where there are several."""
        results = list(gradients)
        of_experts = self._of_experts[op.name]
        for places in reduction.packs(self._summing, of_experts, gradients):
            of_type = [gradients[i] for i in places]
            for kind, inputs, outputs, taken in reduction.nodes_of_sum(of_type):
                self.nodes.append(
                    Node(op.name, kind, inputs, outputs, after, takes_over=taken)
                )
            for i, value in zip(places, outputs, strict=True):
                results[i] = value
        return results

    def _gathered(self, op, rows, after):
        """Rows of all devices, where there are several."""
        if self._summing.devices == 1:
            return [rows]
        shape = self._summing.devices * rows.shape[0], *rows.shape[1:]
        outputs = [Value(shape, rows.dtype)]
        self._add(op, [rows], outputs, after)
        return outputs

    def _list(self, op, inputs):
        """Lists of tensors: their contents are those of a buffer."""
        if op.type in ("TensorListReserve", "EmptyTensorList"):
            number = inputs[-1].array if op.type == "TensorListReserve" else 0
            length = None if number is None else int(number)
            return [Value((), tf.variant, length=length, element=_shape_in(inputs[0]))]
        if op.type == "TensorListFromTensor":
            whole = inputs[0]
            return [
                Value(
                    (),
                    tf.variant,
                    content=whole.num_bytes,
                    length=whole.shape[0],
                    element=whole.shape[1:],
                )
            ]
        if op.type in ("TensorListSetItem", "TensorListPushBack"):
            handle, item = inputs[0], inputs[-1]
            more = item.num_bytes
            length = handle.length
            if op.type == "TensorListPushBack":
                length = (length or 0) + 1
            return [
                dataclasses.replace(
                    handle,
                    root=None,
                    content=handle.content + more,
                    length=length,
                    element=item.shape,
                )
            ]
        dtype = op.outputs[-1].dtype
        if op.type in ("TensorListStack", "TensorListConcatV2"):
            handle = inputs[0]
            element = handle.element or tuple(
                d or 1 for d in op.outputs[0].shape[1:].as_list()
            )
            return [Value((handle.length or 1, *element), dtype)]
        if op.type in ("TensorListGetItem", "TensorListPopBack"):
            handle = inputs[0]
            static = op.outputs[-1].shape
            element = handle.element
            if static.is_fully_defined():
                element = tuple(static.as_list())
            item = Value(element or (), dtype, root=handle)
            if op.type == "TensorListGetItem":
                return [item]
            return [dataclasses.replace(handle, root=handle), item]
        return self._inference.results(op, inputs)

    def _loop(self, graph, op, inputs, after):
        body = _function(graph, op, "body")
        lengths = [v.length for v in inputs if v.length]
        turns = max(lengths, default=1)
        if len(inputs) > 1 and inputs[1].array is not None and inputs[1].shape == ():
            most = int(inputs[1].array)
            turns = most if most > 0 else turns
        invariant = [
            (out.op.type == "Identity" and out.op.inputs[0] is own) or out is own
            for own, out in zip(body.inputs, body.outputs, strict=True)
        ]
        inner = self._inner()
        start = [
            value if same else dataclasses.replace(value, array=None, root=None)
            for value, same in zip(inputs, invariant, strict=True)
        ]
        for value, same in zip(start, invariant, strict=True):
            if not same:
                value.is_kept = True  # counted by the loop's own results
        ends = inner.run(body, start)
        came_from = {
            id(value): end.buffer for value, end in zip(start, ends, strict=True)
        }
        pushed: set[int] = set()
        outputs = []
        for value, end, same in zip(inputs, ends, invariant, strict=True):
            if same:
                outputs.append(dataclasses.replace(value, root=value))
            elif value.dtype == tf.variant:
                added = _pushed(inner.nodes, end, pushed, came_from)
                content = value.content + turns * added
                popped = any(
                    n.kind == "TensorListPopBack"
                    and end.buffer in map(_buffer, n.inputs)
                    for n in inner.nodes
                )
                number = 0 if popped else (value.length or turns)
                outputs.append(
                    Value(
                        (),
                        tf.variant,
                        content=0 if popped else content,
                        length=number,
                        element=end.element or value.element,
                    )
                )
            else:
                outputs.append(Value(end.shape, end.dtype))
        work = turns * sum(n.multiply_adds for n in inner.nodes)
        peak = peak_of(inner.nodes)
        of_turns = {"temporary": peak, "multiply_adds": work, "is_loop": True}
        self._add(op, inputs, outputs, after, **of_turns)
        return outputs

    def _branch(self, graph, op, inputs, after):
        """The branch that takes most."""
        if "Case" in op.type:
            names = [each.name for each in op.get_attr("branches")]
        else:
            names = [op.get_attr(n).name for n in ("then_branch", "else_branch")]
        taken = []
        for name in names:
            inner = self._inner()
            ends = inner.run(_graph_of(graph, name), inputs[1:])
            peak = peak_of(inner.nodes)
            taken.append((peak + sum(v.num_bytes for v in ends), peak, inner, ends))
        _, peak, inner, ends = max(taken, key=lambda each: each[0])
        outputs = [Value(v.shape, v.dtype, v.array) for v in ends]
        work = sum(node.multiply_adds for node in inner.nodes)
        self._add(op, inputs, outputs, after, temporary=peak, multiply_adds=work)
        return outputs

    def _inner(self):
        return Interpreter(self._inference, self._summing, self._of_experts)

    def _add(self, op, inputs, outputs, after, **more):
        self.nodes.append(Node(op.name, op.type, inputs, outputs, after, **more))


def peak_of(nodes: Sequence[Node]) -> int:
    """The most bytes that a function holds at once beside its inputs."""
    return simulate(nodes, lambda value: value.allocated).peak


def _buffer(value):
    return value.buffer


def _pushed(nodes, end, seen, came_from):
    """Bytes that one turn adds to a list, of buffers that no other list has.

    What the loop's turn before left behind (`came_from`) is counted as this turn's.
    """
    added = 0
    chain = {id(end), id(end.buffer)}
    for node in reversed(nodes):
        if node.kind not in ("TensorListPushBack", "TensorListSetItem"):
            continue
        if chain.isdisjoint({id(node.outputs[0]), id(node.outputs[0].buffer)}):
            continue
        chain |= {id(node.inputs[0]), id(node.inputs[0].buffer)}
        item = node.inputs[-1].buffer
        item = came_from.get(id(item), item)
        if id(item) not in seen and (item.dtype == tf.variant or not item.is_kept):
            seen.add(id(item))
            added += node.inputs[-1].allocated  # an entry, if it is of a list
    return added


def _shape_in(value):
    array = value.array
    if array is None or array.ndim != 1 or (array < 0).any():
        return None
    return tuple(int(d) for d in array)


def _function(graph, op, name):
    return _graph_of(graph, op.get_attr(name).name)


def _graph_of(graph, name):
    return getattr(graph, "_get_function")(name).graph  # noqa: B009


def _needed(graph):
    """Operations that run: those that results and writes depend on."""
    roots = [t.op for t in graph.outputs]
    roots += [op for op in graph.get_operations() if _writes(op)]
    roots += list(getattr(graph, "control_outputs", ()))
    found, waiting = set(), list(roots)
    while waiting:
        op = waiting.pop()
        if op.name in found:
            continue
        found.add(op.name)
        waiting += _before(op)
    return _sorted([op for op in graph.get_operations() if op.name in found])


def _before(op):
    return [*(t.op for t in op.inputs), *op.control_inputs]


def _sorted(ops):
    """Operations after what they need, otherwise in the order in which they were made.

    A loop is made before the lists in which its gradient wants values kept.
    """
    done: set[str] = set()
    order = []
    for op in ops:
        stack = [op]
        while stack:
            missing = [each for each in _before(stack[-1]) if each.name not in done]
            if missing:
                stack += missing
                continue
            top = stack.pop()
            if top.name not in done:
                done.add(top.name)
                order.append(top)
    return order


def _writes(op):
    return op.type.startswith("Assign") or (
        op.type.startswith("Resource") and ("Apply" in op.type or "Scatter" in op.type)
    )
