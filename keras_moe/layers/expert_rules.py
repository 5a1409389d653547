"""What holds for one expert's weight, applied to a stack of them."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import engine, updating
from keras_moe.functional.updated_kernels import UpdatedKernels

# Sums over elements: that of a stack is the sum of those of its experts.
_SUMS = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
# Norms along the axes of one expert.
_NORMS = (
    keras.constraints.MaxNorm,
    keras.constraints.MinMaxNorm,
    keras.constraints.UnitNorm,
)


class PerExpertRegularizer(keras.regularizers.Regularizer):
    """Sum of a regularizer over the experts of a stack, once for all devices.

    Args:
        regularizer: A Keras regularizer or a function of one expert's weight.
        frozen: `(E,)` bool array. Experts that are left out.
    """

    def __init__(self, regularizer: Any, frozen: np.ndarray):
        self.regularizer = regularizer
        self.frozen = frozen

    def __call__(self, x):
        here = engine.current()
        frozen, weight = here.weights.left_out_here(x, self.frozen), x
        x = tf.convert_to_tensor(x)
        if type(self.regularizer) in _SUMS:
            if frozen.any():
                x = tf.where(_like(frozen, x), tf.zeros_like(x), x)
            return here.weights.sum_of_parts(weight, self.regularizer(x))
        experts = tf.unstack(here.operations.replicated(x), num=x.shape[0])
        flags = _filled(frozen, x)
        kept = [e for e, left_out in zip(experts, flags, strict=True) if not left_out]
        terms = [tf.cast(self.regularizer(expert), x.dtype) for expert in kept]
        total = tf.add_n([tf.zeros((), x.dtype), *terms])
        return here.weights.sum_of_parts(weight, total)


class PerExpertConstraint(keras.constraints.Constraint):
    """A constraint of every expert of a stack; frozen ones get back what they were.

    Args:
        constraint: A Keras constraint, a function of one expert's weight, or None.
        frozen: `(E,)` bool array.
        before: Gives the weight as the present step has read it, or None.
    """

    def __init__(self, constraint: Any, frozen: np.ndarray, before: Any):
        self.constraint = _along_axes_of_one(constraint)
        self.frozen = frozen
        self._before = before

    def __call__(self, w):
        here = engine.current()
        frozen = here.weights.entries_here(w, self.frozen)
        value = updated = tf.convert_to_tensor(w)
        if isinstance(self.constraint, (*_NORMS, keras.constraints.NonNeg)):
            value = self.constraint(value)
        elif self.constraint is not None:
            whole = here.operations.replicated(value)
            experts = tf.unstack(whole, num=value.shape[0])
            experts = [tf.convert_to_tensor(self.constraint(each)) for each in experts]
            value = tf.stack(experts) if experts else value
        if not frozen.any():
            return value
        before = self._before()
        kept = updated if before is None else before
        return tf.where(_like(frozen, value), kept, value)


def _along_axes_of_one(constraint):
    """Counts the axes of a norm from that after the experts'."""
    if type(constraint) not in _NORMS:
        return constraint
    config = constraint.get_config()
    axes = config["axis"]
    axes = [axes] if isinstance(axes, int) else list(axes)
    axes = [axis + 1 if axis >= 0 else axis for axis in axes]
    return type(constraint).from_config({**config, "axis": axes})


def stop_gradients(value: tf.Tensor, frozen: np.ndarray) -> tf.Tensor:
    """`value`, whose gradient is zero for frozen experts.

    Args:
        value: `(E, ...)` of the experts that are here.
        frozen: `(E,)` bool array.
    """

    @tf.custom_gradient
    def run(x):
        def grad(dy):
            dy = tf.convert_to_tensor(dy)
            return tf.where(_like(frozen, dy), tf.zeros_like(dy), dy)

        return tf.identity(x), grad

    return run(value)


def with_dense_gradient(value: tf.Tensor) -> tf.Tensor:
    """`value`, whose gradient is a tensor whatever arises behind it."""

    @tf.custom_gradient
    def run(x):
        return tf.identity(x), tf.convert_to_tensor

    return run(value)


def value_is_own(weight: Any) -> bool:
    """Whether layers read a Keras variable as it is: without a cast, or another value."""
    return weight.value is weight._value


def _like(flags, x):
    """`(E,)` flags with the rank of x, as a constant."""
    return tf.constant(_filled(flags, x).reshape(-1, *[1] * (x.shape.rank - 1)))


def _filled(flags, x):
    """As many flags as x has experts: on a mesh it may end in experts of zeros."""
    return np.pad(flags, [0, x.shape[0] - len(flags)], constant_values=True)


def verify_frozen(value: Any, num_experts: int) -> tuple[int, ...]:
    """Returns indices of experts as a tuple.

    Raises:
        ValueError: They are no different whole numbers within the experts.
    """
    indices: Any = value if isinstance(value, (Sequence, np.ndarray)) else (None,)
    valid = all(hasattr(i, "__index__") and not isinstance(i, bool) for i in indices)
    valid = valid and all(0 <= i < num_experts for i in indices)
    if not valid or len(set(map(int, indices))) < len(indices):
        raise ValueError(
            "`frozen_experts` must be different indices of experts, at least 0 and "
            f"below num_experts={num_experts}. Received: frozen_experts={value!r}. "
            "Pass for example (0, 3), or () to train all."
        )
    return tuple(map(int, indices))


class StepValues:
    """The value of each weight that the present step has read, for its end.

    Tensors of another graph are of no use. Replicas are threads that share it.
    """

    def __init__(self):
        self._values = {}

    def note(self, key: Any, value: tf.Tensor) -> None:
        """Takes note of a value; `key` is that of the weight."""
        self._values[engine.current_replica(), key] = (engine.current_graph(), value)

    def of(self, key: Any) -> tf.Tensor | None:
        """The value noted in this graph, or in one around it."""
        noted, value = self._values.pop((engine.current_replica(), key), (None, None))
        around = [*engine.current_graphs(), None]  # no graph is around all
        return value if any(graph is noted for graph in around) else None


def kernels_for_update(
    values: list[Any], variables: Sequence[Any], kernels: Sequence[Any]
) -> list[Any]:
    """What experts compute with, where an optimizer may update kernels early.

    Args:
        values: Tensors, first those of `variables`.
        variables: The stacked weights of a layer.
        kernels: Those of them that are kernels.

    Returns:
        `values`, with `UpdatedKernels` for kernels that are trained and have no rules.
    """
    if not updating.is_wanted():
        return values
    free = {
        id(kernel)
        for kernel in kernels
        if kernel.trainable and kernel.regularizer is None and kernel.constraint is None
    }
    own = zip(values, variables, strict=False)
    found = [UpdatedKernels(x, v) if id(v) in free else x for x, v in own]
    return [*found, *values[len(variables) :]]
