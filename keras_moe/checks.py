"""Checks of arguments, shared by the functional code and the layers."""

import inspect
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def verify_positive_int(value: Any, name: str) -> int:
    """Returns `value` as an int, or raises if it is not a whole number >= 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < 1:
        raise ValueError(
            f"`{name}` must be a whole number of at least 1. "
            f"Received: {name}={value!r}. Pass a positive int."
        )
    return int(value)


def verify_k(k: Any, num_experts: int | None = None) -> int:
    """Returns `k` as an int, or raises unless `1 <= k <= num_experts`."""
    k = verify_positive_int(k, "k")
    if num_experts is not None and k > num_experts:
        raise ValueError(
            "`k` must be at most `num_experts`. "
            f"Received: k={k}, num_experts={num_experts}. "
            "Lower `k` or add experts."
        )
    return k


def verify_weight(value: Any, name: str) -> float:
    """Returns `value` as a float, or raises if it is negative or not finite."""
    number = _as_number(value)
    if not 0.0 <= number < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number of at least 0. "
            f"Received: {name}={value!r}. Use 0 to switch the term off."
        )
    return number


def verify_capacity_factor(value: Any, name: str = "capacity_factor") -> float:
    """Returns `value` as a float, or raises if it is not finite and above 0."""
    number = _as_number(value)
    if not 0.0 < number < float("inf"):
        raise ValueError(
            f"`{name}` must be a finite number above 0, or None. "
            f"Received: {name}={value!r}. 1 fits perfect balance, 2 leaves room for "
            "twice the mean; None drops nothing."
        )
    return number


def _as_number(value):
    """`value` as a float, NaN if it is none. "2" is no number, nor is True."""
    if isinstance(value, (str, bytes, bool)):
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def verify_normalization(value: Any) -> str:
    """Returns `value`, or raises if it is no normalization of a top-k gate."""
    if not isinstance(value, str) or value not in ("selected", "all"):
        raise ValueError(
            '`normalization` must be "selected" or "all". '
            f"Received: normalization={value!r}."
        )
    return value


def verify_rate(value: Any, name: str) -> float:
    """Returns `value` as a float, or raises unless `0 <= value < 1`."""
    number = verify_weight(value, name)
    if number >= 1.0:
        raise ValueError(
            f"`{name}` must be at least 0 and below 1. Received: {name}={value!r}. "
            "It is the fraction of values that are dropped."
        )
    return number


def verify_units(value: Any, name: str) -> tuple[int, ...]:
    """Returns `value` (an int or a sequence of ints) as a tuple of positive ints."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
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


def verify_dense(inputs: Any, layer_name: str) -> None:
    """Raises unless `inputs` is one dense tensor."""
    if isinstance(inputs, tf.RaggedTensor):
        remedy = (
            "Call the layer by `tf.ragged.map_flat_values(layer, inputs)`, or pass "
            "`inputs.to_tensor()` and its mask"
        )
    elif isinstance(inputs, tf.SparseTensor):
        remedy = "Pass `tf.sparse.to_dense(inputs)`"
    elif not hasattr(inputs, "dtype") or not hasattr(inputs, "shape"):
        remedy = "Pass one tensor"
    else:
        return
    raise ValueError(
        f"`inputs` of {layer_name} must be one dense tensor (..., features). Received: "
        f"a {type(inputs).__name__}. {remedy}."
    )


def warn_of_time_steps(layer: Any, kind: Any) -> None:
    """Warns where a mixture is called step by step by a wrapper.

    Args:
        layer: The mixture, with `name`.
        kind: The wrapper, `keras.layers.TimeDistributed`.
    """
    for wrapper in _callers("call", 12):
        if isinstance(wrapper, kind) and wrapper.layer is layer:
            warnings.warn(
                f"{layer.name} in {wrapper.name!r} balances every time step by itself "
                "and adds losses for each of them. Leave TimeDistributed out: "
                f"{type(layer).__name__} takes inputs (batch, time, ..., features), all "
                "leading axes as one batch.",
                stacklevel=2,
            )
            return


def _callers(name, most=sys.maxsize):
    """`self` of the methods of this name that the caller of the caller runs in."""
    frame: Any = sys._getframe(2)
    while frame is not None and most:
        if frame.f_code.co_name == name:
            yield frame.f_locals.get("self")
        frame, most = frame.f_back, most - 1


def verify_floating(dtype: Any, layer_name: str) -> None:
    """Raises if `dtype` is not a floating-point type."""
    if not tf.as_dtype(dtype).is_floating:
        raise ValueError(
            f"`inputs` of {layer_name} must be floating point. "
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
