"""Kinds of operations: whose results share a buffer, and how much they compute."""

import math
from typing import Any

from keras_moe.planning.traced.values import Value

# The first result is the first input, as it is or in another shape.
SAME_BUFFER = {
    "CheckNumerics",
    "EnsureShape",
    "ExpandDims",
    "Identity",
    "PlaceholderWithDefault",
    "PreventGradient",
    "Reshape",
    "Snapshot",
    "Squeeze",
    "StopGradient",
    "TensorListGetItem",
}
# Parts of the first axis lie in the buffer of the whole.
_PARTS = {"Slice", "Split", "SplitV", "StridedSlice", "Unpack"}
# The result may take the buffer of an input that nobody needs any more. Not that of
# TensorScatterAdd and its like, which copy their first input whoever needs it;
# ScatterNdNonAliasingAdd does what its name says.
_ANY_INPUT = {
    "Add",
    "AddV2",
    "BiasAdd",
    "Div",
    "DivNoNan",
    "EluGrad",
    "FloorDiv",
    "FloorMod",
    "LeakyReluGrad",
    "LogicalAnd",
    "LogicalOr",
    "Maximum",
    "Minimum",
    "Mul",
    "MulNoNan",
    "Pow",
    "RealDiv",
    "Relu6Grad",
    "ReluGrad",
    "RsqrtGrad",
    "SeluGrad",
    "Select",
    "SelectV2",
    "SigmoidGrad",
    "SoftplusGrad",
    "SoftsignGrad",
    "SqrtGrad",
    "SquaredDifference",
    "Sub",
    "TanhGrad",
    "Xdivy",
    "Xlogy",
}
_FIRST_INPUT = {
    "Abs",
    "AddN",
    "Ceil",
    "Cos",
    "Elu",
    "Erf",
    "Erfc",
    "Exp",
    "Expm1",
    "Floor",
    "Inv",
    "LeakyRelu",
    "Log",
    "Log1p",
    "LogSoftmax",
    "LogicalNot",
    "Neg",
    "Reciprocal",
    "Relu",
    "Relu6",
    "Round",
    "Rsqrt",
    "ScatterNdNonAliasingAdd",
    "Selu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softmax",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Square",
    "Tanh",
    "TensorListSetItem",
    "TensorListPushBack",
    "ZerosLike",
}
PRODUCTS = {"BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "MatMul"}
_CONVOLUTIONS = {
    "Conv2D",
    "Conv2DBackpropFilter",
    "Conv2DBackpropInput",
    "Conv3D",
    "Conv3DBackpropFilterV2",
    "Conv3DBackpropInputV2",
    "DepthwiseConv2dNative",
    "DepthwiseConv2dNativeBackpropFilter",
    "DepthwiseConv2dNativeBackpropInput",
}


def shared_with(op: Any, inputs: list[Value], outputs: list[Value]) -> list[int | None]:
    """For each result the input in whose buffer it lies, or None.

    Args:
        op: A `tf.Operation`.
        inputs: Its inputs.
        outputs: Its results.

    Returns:
        A list of indices of inputs, one for each result.
    """
    if op.type in SAME_BUFFER:
        return [0] + [None] * (len(outputs) - 1)
    if op.type == "Cast" and inputs[0].dtype == outputs[0].dtype:
        return [0]
    if op.type in _PARTS:
        source = 1 if op.type == "Split" else 0
        whole = inputs[source]
        return [source if _is_part(op, whole, v) else None for v in outputs]
    if op.type == "Pack" and len(inputs) == 1:
        return [0]
    return [None] * len(outputs)


def _is_part(op, whole, part):
    """Whether a part of a tensor is a run of its rows."""
    numbers, own = math.prod(whole.shape), math.prod(part.shape)
    if numbers == own:
        return True
    if op.type == "Unpack":
        return op.get_attr("axis") == 0
    if op.type == "StridedSlice" and op.get_attr("shrink_axis_mask") not in (0, 1):
        return False
    if len(part.shape) < len(whole.shape):
        part_rest, rest = part.shape, whole.shape[1:]
    else:
        part_rest, rest = part.shape[1:], whole.shape[1:]
    return tuple(part_rest) == tuple(rest)


def may_take_over(op: Any) -> range:
    """Inputs whose buffer the result may take, if nobody needs it any more."""
    if op.type in _ANY_INPUT:
        return range(len(op.inputs))
    return range(1 if op.type in _FIRST_INPUT else 0)


def multiply_adds(op: Any, inputs: list[Value], outputs: list[Value]) -> int:
    """Multiply-adds of products and convolutions; 0 of everything else."""
    if op.type in PRODUCTS:
        transposed = "transpose_a" if op.type == "MatMul" else "adj_x"
        rows = -2 if op.get_attr(transposed) else -1
        return math.prod(outputs[0].shape) * inputs[0].shape[rows]
    if op.type == "Einsum":
        return _of_einsum(op, inputs)
    if op.type in _CONVOLUTIONS:
        return _of_convolution(op, inputs, outputs)
    return 0


def _of_einsum(op, inputs):
    terms = op.get_attr("equation").decode().split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, inputs, strict=True):
        if "..." in term or len(term) != len(value.shape):
            return math.prod(inputs[0].shape) * inputs[-1].shape[-1]
        sizes.update(zip(term, value.shape, strict=True))
    return math.prod(sizes.values())


def _of_convolution(op, inputs, outputs):
    # Every position of the (gradient of the) output meets the whole kernel.
    if "BackpropFilter" in op.type:
        kernel, positions = outputs[0].shape, inputs[2].shape
    elif "BackpropInput" in op.type:
        kernel, positions = inputs[1].shape, inputs[2].shape
    else:
        kernel, positions = inputs[1].shape, outputs[0].shape
    last = op.get_attr("data_format")[-1:] == b"C"
    channels = positions[-1] if last else positions[1]
    return math.prod(positions) // max(1, channels) * math.prod(kernel)
