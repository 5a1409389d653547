"""Sums of gradients over devices: marked where a step is traced, then put in.

A device concatenates the gradients of a type, the sum takes the place of what was
concatenated, and is cut up again. No weight is updated before the last gradient is
there. Rows of tables are gathered from all devices instead.
"""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe import runtime
from keras_moe.planning.traced.values import Value

# Names of what marks gradients, and rows of gradients.
_GRADIENTS, _ROWS = "summed_over_devices", "gathered_from_devices"
# Kinds of nodes.
PACK, SUM = "PackGradients", "SumGradients"


class Reduction(NamedTuple):
    """Devices that sum their gradients.

    Attributes:
        devices: Int. All of them, which have the weights that are not of experts.
        holders: Int. Those that have the same experts.
    """

    devices: int = 1
    holders: int = 1

    @property
    def smallest(self) -> "Reduction":
        """The least numbers for which the same devices sum the same gradients."""
        holders = min(self.holders, 2)
        among_some = 1 < self.holders < self.devices
        return Reduction(4 if among_some else min(self.devices, 2), holders)

    @property
    def larger(self) -> "Reduction":
        """Twice as many devices, of which the same sum the same gradients."""
        among_all = self.holders == self.devices
        return Reduction(2 * self.devices, self.holders * (1 + among_all))


class Marks:
    """What is known of marked gradients.

    Attributes:
        of_experts: By the name of what marks them, for each gradient whether it is of
            a weight that devices share.
        has_rows: Bool. Whether some are rows of tables.
    """

    def __init__(self):
        self.of_experts: dict[str, list[bool]] = {}
        self.has_rows = False


@contextlib.contextmanager
def marked(optimizer: Any, shared: Collection[int]) -> Iterator[Marks]:
    """Marks the gradients that an optimizer gets inside the `with` block.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.
        shared: `id`s of the Keras variables that devices share.

    Yields:
        The `Marks`.
    """
    marks, apply = Marks(), optimizer.apply

    def with_marks(grads, trainable_variables=None):
        grads = list(grads)
        variables = [None] * len(grads)
        if trainable_variables is not None:
            trainable_variables = variables = list(trainable_variables)
        places = [i for i, g in enumerate(grads) if tf.is_tensor(g)]
        dense = [i for i in places if not isinstance(grads[i], tf.IndexedSlices)]
        for i in set(places) - set(dense):
            marks.has_rows = True
            grads[i] = tf.IndexedSlices(
                _unsized(grads[i].values),
                _unsized(grads[i].indices),
                grads[i].dense_shape,
            )
        if dense:
            summed = tf.identity_n([grads[i] for i in dense], name=_GRADIENTS)
            for i, gradient in zip(dense, summed, strict=True):
                grads[i] = gradient
            name = summed[0].op.name
            marks.of_experts[name] = [id(variables[i]) in shared for i in dense]
        return apply(grads, trainable_variables)

    with runtime.attribute([optimizer], "apply", with_marks):
        yield marks


def _unsized(rows):
    """The same, of a number of rows that only the values tell."""
    shape = [None, *rows.shape[1:]]
    return tf.compat.v1.placeholder_with_default(rows, shape, name=_ROWS)


def is_of_gradients(op: Any) -> bool:
    """Whether an operation marks gradients that are summed."""
    return op.type == "IdentityN" and _last(op).startswith(_GRADIENTS)


def is_of_rows(op: Any) -> bool:
    """Whether an operation marks rows that are gathered."""
    return op.type == "PlaceholderWithDefault" and _last(op).startswith(_ROWS)


def _last(op):
    return op.name.rpartition("/")[2]


def packs(
    reduction: Reduction, of_experts: list[bool], gradients: list[Value]
) -> list[list[int]]:
    """Which gradients are summed together.

    Args:
        reduction: The `Reduction`.
        of_experts: For each gradient, whether it is of experts.
        gradients: Their values.

    Returns:
        Lists of indices of gradients. Those of experts of one device are in none.
    """
    found: dict[tuple, list[int]] = {}
    for i, (value, experts) in enumerate(zip(gradients, of_experts, strict=True)):
        number = reduction.holders if experts else reduction.devices
        if number > 1:
            among = number == reduction.devices
            found.setdefault((value.dtype, among), []).append(i)
    return list(found.values())


def nodes_of_sum(gradients: list[Value]) -> list[tuple]:
    """What sums gradients of one type over devices.

    Args:
        gradients: Their values on one device.

    Returns:
        `(kind, inputs, outputs, inputs that a result may take over)` of each step; the
        last one's outputs are the sums.
    """
    number = sum(math.prod(v.shape) for v in gradients)
    packed, summed = (Value((number,), gradients[0].dtype) for _ in range(2))
    parts = [Value(v.shape, v.dtype) for v in gradients]
    return [
        (PACK, gradients, [packed], ()),
        (SUM, [packed], [summed], range(1)),
        ("SplitV", [summed], parts, ()),
    ]
