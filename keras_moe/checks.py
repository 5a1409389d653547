"""Checks of arguments, shared by the functional code and the layers.

Shapes and types are compared as far as they are known when a graph is made, values
outside of graphs only: a check adds nothing to a graph.
"""

import inspect
import operator
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_MOST = 2**31 - 1


def verify_int(value: Any, name: str, least: int = 1, most: int = _MOST) -> int:
    """Returns `value`, an int or one of NumPy's, as an int, or raises."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (AttributeError, TypeError):  # a tensor of floats raises the first
        number = None
    if number is None or not least <= number <= most:
        raise ValueError(
            f"`{name}` must be a whole number of at least {least} and at most {most}. "
            f"Received: {name}={value!r}. Pass an int within these bounds."
        )
    return number


def verify_positive_int(value: Any, name: str) -> int:
    """Returns `value` as an int, or raises if it is not a whole number >= 1."""
    return verify_int(value, name)


def verify_seed(value: Any) -> Any:
    """Returns a seed that Keras takes: None, an int or a generator."""
    if value is None or hasattr(value, "next"):
        return value
    return verify_int(value, "seed", -(2**62), 2**62)


def verify_number(
    value: Any,
    name: str,
    bounds: str = "[0, inf)",
    rest: str = ". Pass one within these bounds.",
) -> float:
    """Returns `value` as a float, or raises; a round bracket excludes a bound."""
    low, high = map(float, bounds[1:-1].split(","))
    try:
        refused = isinstance(value, bool | str | bytes) or np.ndim(value)
        number = float("nan") if refused else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    above = number > low if bounds[0] == "(" else number >= low
    if not (above and (number < high if bounds[-1] == ")" else number <= high)):
        raise ValueError(
            f"`{name}` must be a finite number within {bounds}. "
            f"Received: {name}={value!r}{rest}"
        )
    return number


def verify_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {name}={value!r}. Pass one of them."
        )


def verify_texts(value: Any, name: str) -> list[str]:
    """Returns a list of str, or raises; a str by itself is not one."""
    one = isinstance(value, str | bytes)
    texts = [] if one else list(value)
    if one or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"`{name}` must be a list of str, not text. Received: {name}={str(value)[:60]!r}. "
            "Pass a list with one str for each."
        )
    return texts


def verify_shape(shape: Any, why: str, **tensors: Any) -> None:
    """Raises unless tensors, as far as is known, have a shape; None has every one."""
    for name, tensor in tensors.items():
        if tensor is not None and not tf.TensorShape(tensor.shape).is_compatible_with(
            shape
        ):
            raise ValueError(
                f"`{name}` must have the shape {tf.TensorShape(shape)}, {why}. "
                f"Received: {name}.shape={tensor.shape}. Pass one value for each; "
                "none is repeated or left out."
            )


def verify_broadcast(mask: Any, shape: Any, name: str) -> Any:
    """Returns a mask with as many axes as `shape`, or raises unless it broadcasts to it.

    An axis whose size is not known, None, may have any.
    """
    missing = len(shape) - len(mask.shape)
    sizes = zip(mask.shape, shape[max(missing, 0) :], strict=False)
    if missing < 0 or any(size and own not in (1, None, size) for own, size in sizes):
        raise ValueError(
            f"`{name}` must broadcast to {tuple(shape)}: True where a position (axis 1) "
            f"may attend to another. Received: {name}.shape={tuple(mask.shape)}. Each "
            "axis must be as long as that, or 1."
        )
    for _ in range(missing):
        mask = mask[tf.newaxis]
    return mask


def verify_mask(mask: Any, shape: Any, name: str = "mask") -> Any:
    """Returns a mask as a tensor, or raises unless it is bool and of a shape."""
    mask = None if mask is None else tf.convert_to_tensor(mask)
    if mask is not None and mask.dtype != tf.bool:
        raise ValueError(
            f"`{name}` must be of bools. Received: {name} of {mask.dtype.name}. "
            "Compare it with something, or cast it."
        )
    verify_shape(shape, "one value a token", **{name: mask})
    return mask


def verify_ids(ids: Any, name: str, size: int | None = None, least: int = 0) -> Any:
    """Returns ints, a tensor or an array, or raises unless `least <= ids < size`."""
    if not tf.is_tensor(ids):
        ids = np.asarray(ids)
        ids = ids if ids.size else ids.astype(np.int32)
    dtype = tf.as_dtype(ids.dtype)
    if not dtype.is_integer:
        raise ValueError(
            f"`{name}` must be whole numbers. Received: dtype={dtype.name}, "
            f"shape={ids.shape}. Nothing is rounded; cast them if that is meant."
        )
    if size is not None and not tf.is_symbolic_tensor(ids):
        values = np.asarray(ids)
        if values.size and not least <= values.min() <= values.max() < size:
            raise ValueError(
                f"`{name}` must be within [{least}, {size}). Received: {name} from "
                f"{values.min()} to {values.max()}. Correct them."
            )
    return ids


def verify_count(value: Any, name: str, least: int = 0) -> Any:
    """Returns a number of things, an int or a scalar tensor of ints, or raises."""
    if tf.is_tensor(value) and tf.is_symbolic_tensor(value):
        return verify_ids(value, name)
    return verify_int(value, name, least, 2**62)


def verify_counts(counts: Any, num_experts: int, rows: Any) -> Any:
    """Returns the rows of each expert, or raises unless all rows are theirs."""
    counts = verify_ids(counts, "counts", _MOST)
    verify_shape([num_experts], "one count for each expert", counts=counts)
    if not tf.is_symbolic_tensor(counts) and not tf.is_symbolic_tensor(rows):
        total = int(np.sum(counts))
        if total != rows.shape[0]:
            raise ValueError(
                "`counts` must add up to the rows of the inputs. Received: a sum of "
                f"{total}, {rows.shape[0]} rows. Give each expert its number of rows."
            )
    return counts


def verify_k(k: Any, num_experts: int | None = None) -> int:
    """Returns `k` as an int, or raises unless `1 <= k <= num_experts`."""
    k = verify_positive_int(k, "k")
    if num_experts is not None and k > verify_int(num_experts, "num_experts"):
        raise ValueError(
            "`k` must be at most `num_experts`. "
            f"Received: k={k}, num_experts={num_experts}. "
            "Lower `k` or add experts."
        )
    return k


def verify_fixed(given: dict[str, Any], of: str, **fixed: Any) -> None:
    """Raises if options that a class has settled are among those given to it."""
    for name, value in fixed.items():
        if name in given:
            raise ValueError(
                f"`{name}` of {of} is fixed: {value!r}. Received: {name}="
                f"{given[name]!r}. Leave it out, or use TopKGating."
            )


def verify_weight(value: Any, name: str) -> float:
    """Returns `value` as a float, or raises if it is negative or not finite."""
    return verify_number(value, name, rest=". Use 0 to switch the term off.")


def verify_capacity_factor(value: Any, name: str = "capacity_factor") -> float:
    """Returns `value` as a float, or raises if it is not finite and above 0."""
    rest = ". 1 fits perfect balance, 2 leaves room for twice the mean; None drops nothing."
    return verify_number(value, name, "(0, inf)", rest)


def verify_rate(value: Any, name: str) -> float:
    """Returns `value` as a float, or raises unless `0 <= value < 1`."""
    return verify_number(value, name, "[0, 1)", ". It is a fraction; 0 is none.")


def verify_units(value: Any, name: str) -> tuple[int, ...]:
    """Returns `value` (an int or a sequence of ints) as a tuple of positive ints."""
    values = tuple(value) if np.ndim(value) else (value,)
    if not values:
        raise ValueError(
            f"`{name}` must name at least one layer. Received: {name}={value!r}. "
            "Pass an int, or one int for each hidden layer."
        )
    return tuple(verify_positive_int(v, name) for v in values)


def verify_input_shape(shape: Sequence[int | None], layer_name: str) -> int:
    """Returns the feature dimension of `shape`, or raises if there is none.

    Args:
        shape: Shape with at least one leading dimension and a known last one.
        layer_name: Named in the message.

    Returns:
        The size of the last dimension.

    Raises:
        ValueError: There are several tensors, the rank is below 2, or the last
            dimension is unknown.
    """
    if isinstance(shape, dict) or any(
        isinstance(part, (Sequence, dict, tf.TensorShape)) for part in shape
    ):
        raise ValueError(
            f"`inputs` of {layer_name} must be one tensor (..., features). Received: "
            f"a {type(shape).__name__} of {len(shape)} tensors with shapes {shape}. "
            "Pass one of them, or concatenate them first."
        )
    shape = tuple(shape)
    if len(shape) < 2:
        raise ValueError(
            f"`inputs` of {layer_name} must have rank 2 or more: (..., features). "
            f"Received: shape={shape}, rank={len(shape)}. "
            "Add a leading batch dimension."
        )
    if shape[-1] is None:
        raise ValueError(
            f"The last dimension of `inputs` of {layer_name} must be known, since "
            f"the weights depend on it. Received: shape={shape}. "
            "Give the feature dimension in `keras.Input` or with `ensure_shape`."
        )
    return int(shape[-1])


def verify_dense(inputs: Any, layer_name: str, argument: str = "inputs") -> None:
    """Raises unless an argument is one dense tensor."""
    if isinstance(inputs, tf.RaggedTensor):
        remedy = (
            f"Call the layer by `tf.ragged.map_flat_values(layer, {argument})`, or pass "
            f"`{argument}.to_tensor()` and its mask"
        )
    elif isinstance(inputs, tf.SparseTensor):
        remedy = f"Pass `tf.sparse.to_dense({argument})`"
    elif not hasattr(inputs, "dtype") or not hasattr(inputs, "shape"):
        remedy = "Pass one tensor"
    else:
        return
    raise ValueError(
        f"`{argument}` of {layer_name} must be one dense tensor (..., features). "
        f"Received: a {type(inputs).__name__}. {remedy}."
    )


def warn_of_time_steps(layer: Any, kind: Any) -> None:
    """Warns where a mixture is called step by step by a wrapper.

    Args:
        layer: The mixture, with `name`.
        kind: The wrapper, `keras.layers.TimeDistributed`.
    """
    for wrapper in _callers():
        if isinstance(wrapper, kind) and wrapper.layer is layer:
            warnings.warn(
                f"{layer.name} in {wrapper.name!r} balances every time step by itself "
                "and adds losses for each of them. Leave TimeDistributed out: "
                f"{type(layer).__name__} takes inputs (batch, time, ..., features), all "
                "leading axes as one batch.",
                stacklevel=2,
            )
            return


def _callers():
    """`self` of every `call` among the 12 frames around that of the layer."""
    frame: Any = sys._getframe(2)
    for _ in range(12):
        if frame is None:
            return
        if frame.f_code.co_name == "call":
            yield frame.f_locals.get("self")
        frame = frame.f_back


def verify_floating(dtype: Any, layer_name: str, argument: str = "inputs") -> None:
    """Raises if `dtype` is not a floating-point type."""
    if not tf.as_dtype(dtype).is_floating:
        raise ValueError(
            f"`{argument}` of {layer_name} must be floating point. "
            f"Received: dtype={tf.as_dtype(dtype).name}. "
            "Embed token ids or cast the inputs to a float type first."
        )


def verify_config(cls: type, config: dict[str, Any]) -> None:
    """Raises unless a config has every key that a class cannot do without.

    Args:
        cls: The class to be made.
        config: Of its `from_config`.

    Raises:
        ValueError: A key is missing.
    """
    _, *parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    for parameter in parameters:
        name = parameter.name
        takes_any = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if (
            parameter.default is parameter.empty
            and not takes_any
            and name not in config
        ):
            raise ValueError(
                f"`config` of {cls.__name__} must have the key {name!r}. Received: "
                f"config with the keys {sorted(config)}. Pass all that `get_config` "
                "gives."
            )


class FromConfig:
    """First base of a class whose `from_config` names a key that is missing."""

    @classmethod
    def from_config(cls, config):
        verify_config(cls, config)
        return super().from_config(config)  # type: ignore[misc]
