"""What is known of a tensor before anything runs."""

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

# The allocator of TensorFlow lends out multiples of this.
_UNIT = 256


@dataclasses.dataclass(eq=False)
class Value:
    """A tensor of a step that is not run.

    Attributes:
        shape: Its shape, all of it known or assumed.
        dtype: `tf.DType`.
        array: Its value where that follows from shapes and constants, else None.
        root: The value whose buffer it shares, None if it has one of its own.
        is_kept: Bool. Whether the buffer stays from step to step (a variable).
        variable: Of a handle, the `Value` of its variable.
        content: Int. Bytes in a list of tensors.
        length: Int or None. Tensors in a list.
        element: Shape of a list's tensors, None if not known.
        entries: `(experts, experts that stay together)` of a stacked weight, or of
            what is as large as its experts, else None.
    """

    shape: tuple[int, ...]
    dtype: Any
    array: Any = None
    root: "Value | None" = None
    is_kept: bool = False
    variable: "Value | None" = None
    content: int = 0
    length: int | None = None
    element: tuple | None = None
    entries: tuple[int, int] | None = None

    @property
    def buffer(self) -> "Value":
        """The value that owns the buffer."""
        value = self
        while value.root is not None:
            value = value.root
        return value

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        if self.dtype == tf.variant:
            return self.content
        if self.dtype in (tf.resource, tf.string):
            return 0
        return math.prod(self.shape) * self.dtype.size

    @property
    def allocated(self) -> int:
        """Bytes that its buffer takes."""
        return -(-self.num_bytes // _UNIT) * _UNIT


def known(array: Any) -> Value:
    """A `Value` of which everything is known."""
    array = np.asarray(array)
    return Value(array.shape, tf.as_dtype(array.dtype), array)
