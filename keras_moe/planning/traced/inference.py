"""Shapes and values of an operation's results, by TensorFlow's own kernels and rules."""

import inspect
from typing import Any

import numpy as np
import tensorflow as tf

from keras_moe.planning.traced.values import Value, known

# Values of more elements are not computed: what follows from them are data, not shapes.
_MOST_ELEMENTS = 1 << 24
# Constants of so many numbers may be what shapes are made of.
_MOST_CONSTANTS = 1 << 16
OF_SHAPES = ("Shape", "ShapeN", "Size", "Rank")
_PICKS = ("TopKV2", "ArgMax", "ArgMin")


class Inference:
    """Results of operations, remembered where the same comes again."""

    def __init__(self):
        self._shapes: dict[tuple, list] = {}
        self.assumed: set[str] = set()

    def results(self, op: Any, inputs: list[Value]) -> list[Value]:
        """What an operation returns.

        Args:
            op: A `tf.Operation`.
            inputs: What is known of its inputs.

        Returns:
            A `Value` for each output. Sizes that depend on data are assumed: experts
            are chosen at random, all alike, and a mask lets everything through.
        """
        if op.type in OF_SHAPES:
            return _of_shapes(op, inputs)
        if op.type == "Const":
            return [_constant(op)]
        if _can_be_computed(op, inputs):
            computed = _compute(op, inputs)
            if computed is not None:
                return computed
        values = [Value(_or_none(t.shape), t.dtype) for t in op.outputs]
        if any(v.shape is None and v.dtype != tf.variant for v in values):
            for value, shape in zip(values, self._inferred(op, inputs), strict=True):
                value.shape = shape
        if op.type in _PICKS:
            values[-1].array = _choices(op, inputs, values[-1])
        return values

    def _inferred(self, op, inputs):
        """Shapes by TensorFlow's rules; what is left open is assumed."""
        key = (op.type, str(op.node_def.attr), tuple(map(_key, inputs)))
        if key not in self._shapes:
            shapes = _infer(op, inputs)
            self._shapes[key] = [
                self._assume(op, shape, inputs, t.dtype)
                for shape, t in zip(shapes, op.outputs, strict=True)
            ]
        return self._shapes[key]

    def _assume(self, op, shape, inputs, dtype):
        if dtype in (tf.variant, tf.resource):
            return ()
        if shape.is_fully_defined():
            return tuple(shape.as_list())
        if op.type in ("DynamicStitch", "ParallelDynamicStitch"):
            half = len(inputs) // 2
            rows = sum(int(np.prod(v.shape)) for v in inputs[:half])
            return (rows, *shape[1:])
        self.assumed.add(op.type)
        like = max((v for v in inputs), key=lambda v: v.num_bytes, default=None)
        rows = int(np.prod(like.shape)) if like is not None else 1
        if shape.rank is None:
            return () if like is None else like.shape
        if op.type == "Where":
            return (rows, shape[1] or len(inputs[0].shape))
        if like is None or not like.shape:
            return tuple(rows if d is None else d for d in shape)
        if op.type in ("SplitV", "Split", "DynamicPartition"):
            rows = -(-like.shape[0] // len(op.outputs))
        elif len(like.shape) == shape.rank:
            return tuple(
                own if d is None else d
                for d, own in zip(shape, like.shape, strict=True)
            )
        else:
            rows = like.shape[0]
        return tuple(rows if d is None else d for d in shape)


def _key(value):
    array = value.array
    small = array is not None and array.size <= 64
    return value.shape, value.dtype, array.tobytes() if small else id(array)


def _or_none(shape):
    return tuple(shape.as_list()) if shape.is_fully_defined() else None


def _of_shapes(op, inputs):
    dtype = op.outputs[0].dtype.as_numpy_dtype
    if op.type == "Size":
        return [known(dtype(np.prod(inputs[0].shape, dtype=np.int64)))]
    if op.type == "Rank":
        return [known(dtype(len(inputs[0].shape)))]
    return [known(np.array(value.shape, dtype)) for value in inputs]


def _constant(op):
    output = op.outputs[0]
    shape = tuple(output.shape.as_list())
    value = Value(shape, output.dtype, is_kept=True)
    if output.dtype != tf.string and np.prod(shape) <= _MOST_CONSTANTS:
        value.array = tf.make_ndarray(op.get_attr("value"))
    return value


def _can_be_computed(op, inputs):
    if not op.outputs or not inputs or op.op_def.is_stateful:
        return False
    simple = all(v.array is not None and v.array.size <= _MOST_ELEMENTS for v in inputs)
    plain = all(t.dtype not in (tf.variant, tf.resource, tf.string) for t in op.outputs)
    return simple and plain and not any(a.HasField("func") for a in _attrs(op))


def _attrs(op):
    return op.node_def.attr.values()


def _compute(op, inputs):
    """Runs an operation on values that are known; None if that cannot be done."""
    with tf.init_scope(), tf.device("CPU:0"):
        try:
            results = _call(op, [tf.constant(v.array, v.dtype) for v in inputs])
        except (tf.errors.OpError, TypeError, ValueError, AttributeError):
            return None
        return [known(r.numpy()) for r in results]


def _infer(op, inputs):
    """Static shapes of the results in a graph of their own."""
    with tf.Graph().as_default():
        arguments = [
            tf.constant(v.array, v.dtype)
            if v.array is not None and v.array.size <= _MOST_CONSTANTS
            else tf.raw_ops.Placeholder(
                dtype=v.dtype,
                shape=tf.TensorShape(None) if v.dtype == tf.variant else v.shape,
            )
            for v in inputs
        ]
        try:
            return [r.shape for r in _call(op, arguments)]
        except (TypeError, ValueError, AttributeError):
            return [t.shape for t in op.outputs]


def _call(op, tensors):
    """An operation like `op` on other tensors."""
    function = getattr(tf.raw_ops, op.type)
    wanted = [name for name in inspect.signature(function).parameters if name != "name"]
    given, tensors = {}, list(tensors)
    for argument in op.op_def.input_arg:
        attr = argument.number_attr or argument.type_list_attr
        if attr:
            number = op.get_attr(attr)
            number = number if isinstance(number, int) else len(number)
            given[argument.name], tensors = tensors[:number], tensors[number:]
        else:
            given[argument.name] = tensors.pop(0)
    attrs = {attr.name for attr in op.op_def.attr}
    given |= {
        name: op.get_attr(name) for name in wanted if name in attrs - given.keys()
    }
    # Some have another name in Python; those come in the same order.
    left = [name for name in wanted if name not in given]
    renamed = [name for name in given if name not in wanted]
    given |= {new: given.pop(old) for old, new in zip(renamed, left, strict=False)}
    inferred = _inferred_attrs(op.op_def)
    rest = [name for name in sorted(attrs - inferred) if name not in wanted]
    for name, old in zip(left[len(renamed) :], rest, strict=True):
        given[name] = op.get_attr(old)
    results = function(**given)
    return list(results) if isinstance(results, (list, tuple)) else [results]


def _inferred_attrs(op_def):
    """Attributes that follow from the inputs."""
    inputs = op_def.input_arg
    return {
        a
        for each in inputs
        for a in (each.type_attr, each.number_attr, each.type_list_attr)
    }


def _choices(op, inputs, chosen):
    """Indices of what a gate chooses if every expert is as likely as any other."""
    scores = inputs[0]
    if scores.array is not None or not scores.shape or not scores.dtype.is_floating:
        return None
    axis = -1
    if op.type != "TopKV2":
        if inputs[1].array is None:
            return None
        axis = int(inputs[1].array)
    number = scores.shape[axis]
    if not number:
        return None
    drawn = np.random.default_rng(0).integers(0, number, chosen.shape)
    if op.type == "TopKV2":  # different ones, of neighbors
        drawn = (drawn[..., :1] + np.arange(chosen.shape[-1])) % number
    return drawn.astype(chosen.dtype.as_numpy_dtype)
