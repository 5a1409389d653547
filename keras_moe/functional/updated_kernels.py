"""Kernels whose gradient is used up where it arises, and never laid out.

The gradient of the stacked kernels of all experts is as large as the kernels. Where an
optimizer wants it (`keras_moe.updating`), the gradients of a few experts are handed to
it as soon as they are there, and the tape is told that there is none.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_moe import updating
from keras_moe.functional import expert_products


class UpdatedKernels:
    """The kernels of all experts, `(E, in, out)`, for one call.

    Attributes:
        value: The tensor they are.
        variable: The Keras variable they are read from.
    """

    def __init__(self, value: tf.Tensor, variable: Any):
        updating.note_use(variable)
        self.value, self.variable = value, variable
        self.shape, self.dtype = value.shape, value.dtype
        self._update: Any = None  # of the backward pass
        self._is_decided = False
        self._uses = [0] * value.shape[0]

    def split(self) -> list["ExpertKernel"]:
        """For each expert its own, `(1, in, out)`."""
        parts = tf.split(self.value, self.value.shape[0])
        return [ExpertKernel(self, i, part) for i, part in enumerate(parts)]

    def note_product(self, expert):
        self._uses[expert] += 1

    def update(self):
        """What takes the gradients of the experts, None where the tape shall have them."""
        if not self._is_decided:
            self._is_decided = True
            step = updating.step_of(self.variable)
            if step is not None and all(uses == 1 for uses in self._uses):
                self._update = step.optimizer.begin_update(self.variable)
                if self._update is not None:
                    step.updated.append(self.variable)
        return self._update


class ExpertKernel:
    """The kernel of one expert, `(1, in, out)`: `product` multiplies rows with it."""

    def __init__(self, source: UpdatedKernels, expert: int, value: tf.Tensor):
        self._source, self._expert, self.value = source, expert, value
        self.shape, self.dtype = value.shape, value.dtype

    def times(self, x: tf.Tensor) -> tf.Tensor:
        """`(1, R, in)` -> `(1, R, out)`."""
        self._source.note_product(self._expert)

        @tf.custom_gradient
        def run(x, value):
            def grad(dy):
                update = self._source.update()
                if update is None:
                    d_x = expert_products.gradient_of_rows(dy, value)
                    return d_x, expert_products.gradient_of_kernel(x, dy, value)
                # Read again: the tensor of the forward pass would keep all kernels
                # from being written where they lie.
                kernel, dy = update.read(self._expert, dy)
                d_x = expert_products.gradient_of_rows(dy, tf.cast(kernel, dy.dtype))
                update.add(
                    self._expert, expert_products.gradient_of_kernel(x, dy, kernel)
                )
                return d_x, None

            return expert_products.times(x, value), grad

        return run(x, self.value)


def as_tensors(weights: Sequence[Any]) -> list[tf.Tensor]:
    """The same weights, all as tensors with ordinary gradients."""
    return [_as_tensor(w) for w in weights]


def has_updated(weights: Sequence[Any]) -> bool:
    """Whether there are weights whose gradients an optimizer may want early."""
    return any(isinstance(w, UpdatedKernels) for w in weights)


def _as_tensor(weight):
    if isinstance(weight, UpdatedKernels):
        return weight.value
    return tf.convert_to_tensor(weight) if isinstance(weight, tf.Variable) else weight


def split_each(weights: Sequence[Any], number: int) -> list[list]:
    """For each weight its parts, one for each expert."""
    return [
        w.split() if isinstance(w, UpdatedKernels) else tf.split(w, number)
        for w in weights
    ]
