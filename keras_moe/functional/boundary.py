"""What every public function of `functional` checks before it runs, in one place.

Arrays and lists of numbers become tensors, numbers must be of the kind annotated, and
shapes those described: by `"clean_logits:NE noise:NE"` two tensors share both axes, so
nothing is broadcast. Shapes count as far as they are known, values outside of graphs
only: no graph grows by it.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import ops
from keras_moe.functional.updated_kernels import UpdatedKernels


def checked(function: Callable, shapes: str = "") -> Callable:
    """A function of tensors with its checks.

    Args:
        function: Annotated.
        shapes: For some arguments a name, a colon, and a letter for each axis (`.` is
            any length), or `~`: a shape that is shared as a whole, that of
            `plan.positions` if there is a plan. Then `?` for bools; `#` for whole
            numbers, `#E` for those from 0, below E, `#-E` with -1, `#+` without end.
            E is `num_experts`; the first axis of `~` is M if it has one, else N.

    Returns:
        The function behind its checks, which raise a `ValueError`.
    """
    signature = inspect.signature(function)
    described = dict(each.split(":") for each in shapes.split())

    @tf.autograph.experimental.do_not_convert
    def prepared(args, kwargs):
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        for name, value in given.items():
            kind = signature.parameters[name].annotation
            given[name] = _converted(value, name, kind)
        sizes: dict[str, Any] = {"E": given.get("num_experts"), "+": 2**62}
        if "plan" in given:
            _learn(sizes, "~", given["plan"].positions.shape)
        for name, description in described.items():
            value = given.get(name)
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    _verify(each, name, description, sizes)
        return bound

    @functools.wraps(function)
    def run(*args, **kwargs):
        bound = prepared(args, kwargs)
        return function(*bound.args, **bound.kwargs)

    return run


def _converted(value, name, kind):
    if value is None and kind not in (int, float, tf.Tensor | int):
        return None
    if kind in (tf.Tensor, tf.Tensor | None):
        is_one = tf.is_tensor(value) or isinstance(value, UpdatedKernels)
        return value if is_one else tf.convert_to_tensor(value)
    if kind in (Sequence[tf.Tensor], Sequence[tf.Tensor] | None):
        return [_converted(each, name, tf.Tensor) for each in value]
    if kind in (tf.Tensor | int, tf.Tensor | int | None):
        return checks.verify_count(value, name)
    if kind in (int, int | None):
        return checks.verify_int(value, name)
    return checks.verify_number(value, name) if kind is float else value


def _learn(sizes, axes, shape):
    if axes == "~":
        sizes.setdefault("~", shape)
        axes = "M" if shape.rank == 1 else "N"
    for letter, size in zip(axes, shape if shape.rank else (), strict=False):
        if letter != "." and sizes.get(letter) is None:
            sizes[letter] = size


def _verify(tensor, name, description, sizes):
    axes, _, limit = description.partition("#")
    if axes.endswith("?"):
        axes = axes[:-1]
        checks.verify_mask(tensor, None, name)
    whole = sizes.get("~", tensor.shape)
    wanted = whole if axes == "~" else [sizes.get(letter) for letter in axes]
    checks.verify_shape(wanted, f"({', '.join(axes)})", **{name: tensor})
    _learn(sizes, axes, tensor.shape)
    if "#" in description:
        size = sizes.get(limit[-1:]) if ops.values_are_here() else None
        checks.verify_ids(tensor, name, size, -1 if "-" in limit else 0)
