"""What reads a weight before its step: a step that comes sooner copies all of the weight."""

from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from keras_moe import engine, updating
from keras_moe.optimizers import adam

# Their outputs are their first inputs, under another shape or name.
_SAME_MEMORY = [
    "ExpandDims",
    "Identity",
    "IdentityN",
    "PreventGradient",
    "Reshape",
    "Squeeze",
    "StopGradient",
]
# Their outputs may lie in the memory of what they take apart.
_PARTS = ["Slice", "Split", "SplitV", "StridedSlice", "Unpack"]


class Readers:
    """The operations of a step that read weights and that its gradients need.

    TensorFlow writes a variable where it lies only if nobody holds its value any more. Else
    it first copies all of it. The product of the backward pass that takes a kernel and the
    gradient of that kernel need not wait for each other, so without more ado it is left to
    chance whether a kernel's step comes before its last reader.

    Args:
        gradients: Tensors, `IndexedSlices` or None: all of a step.
    """

    def __init__(self, gradients: Iterable[Any]):
        self._needed: set[str] = set()
        if not _can_wait():
            return
        found = tf.nest.flatten(list(gradients), expand_composites=True)
        waiting = [tensor.op for tensor in found if tensor is not None]
        while waiting:
            operation = waiting.pop()
            if operation.name not in self._needed:
                self._needed.add(operation.name)
                waiting += [tensor.op for tensor in operation.inputs]
                waiting += operation.control_inputs

    def of(self, variable: Any) -> list[tf.Operation]:
        """Those that must be done before a variable is written.

        Args:
            variable: A weight in an optimizer's step.

        Returns:
            Operations of this graph: none where a step does not wait, in eager mode, under
            XLA, on a mesh, and between replicas. Within a condition (of accumulated
            gradients, say) none of those outside of it.
        """
        variable = adam.resource_of(variable)
        # Between replicas a step is not of the one whose gradients these are.
        if not self._needed or not _can_wait() or not hasattr(variable, "handle"):
            return []
        handle = tf.compat.v1.get_default_graph().capture(variable.handle)
        values = [
            operation.outputs[0]
            for operation in handle.consumers()
            if operation.type == "ReadVariableOp"
        ]
        found = {}
        while values:
            value = values.pop()
            for operation in value.consumers():
                if operation.name in self._needed:
                    found[operation.name] = operation
                if operation.type in _SAME_MEMORY:
                    pairs = zip(operation.inputs, operation.outputs, strict=False)
                    values += [output for input, output in pairs if input is value]
                elif operation.type in _PARTS:
                    values += operation.outputs
        return list(found.values())


def _can_wait():
    return (
        not tf.executing_eagerly()
        and (updating.is_on_one_device() or engine.current().has_experts)
        and hasattr(tf.compat.v1.get_default_graph(), "capture")
    )


NONE = Readers(())
