"""Operations that are done in another way on some engines.

This is the one place of `functional` that asks for the engine; besides, `capacity` and
`experts` ask `runtime` for the kind of device.
"""

from collections.abc import Callable

import tensorflow as tf

from keras_moe import engine
from keras_moe.types import at_least_float32


def top_k(values: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The k largest of each row in descending order, and where; lower index first."""
    return engine.current().operations.top_k(values, k)


def pick(values: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Of each row of `(N, E)` the values at `(N, K)` indices."""
    return engine.current().operations.pick(values, indices)


def sum_by_expert(values: tf.Tensor, indices: tf.Tensor, num_experts: int) -> tf.Tensor:
    """Sum of the values of each expert, `(E,)`; index -1 is left out."""
    return engine.current().operations.sum_by_expert(values, indices, num_experts)


def count_by_expert(indices: tf.Tensor, num_experts: int) -> tf.Tensor:
    """How often each expert occurs, `(E,)` int32; index -1 is left out."""
    return engine.current().operations.count_by_expert(indices, num_experts)


def sum_of_rows(values: tf.Tensor) -> tf.Tensor:
    """`(N, E)` -> `(E,)`."""
    return engine.current().operations.sum_of_rows(values)


def largest_of_columns(values: tf.Tensor, m: tf.Tensor) -> tf.Tensor:
    """`(N, E)` bool: the m largest of each column; of equals the upper ones."""
    return engine.current().operations.largest_of_columns(values, m)


def over_columns(
    values: tf.Tensor, function: Callable[[tf.Tensor], tf.Tensor], filling: float
) -> tf.Tensor:
    """Masks of columns that run over the rows of every replica, see `Operations`."""
    return engine.current().operations.over_columns(values, function, filling)


def sum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """Sum over the replicas that share a global batch, with its gradient.

    Each replica that makes a loss of it counts as a part of one: Keras divides the
    losses of a step by the number of replicas.
    """
    return engine.current().replicas.sum(value)


def values_are_here() -> bool:
    """Whether a value can be looked at: on a mesh it lies on many devices."""
    return engine.current().values_are_here


def results_are_static() -> bool:
    """Whether shapes must not depend on the data, on one device or a mesh."""
    return engine.current().static_shapes


def shapes_are_static() -> bool:
    """Whether the code is for one device where shapes must not depend on the data."""
    here = engine.current()
    return here.static_shapes and here.values_are_here


def is_compiled_by_xla() -> bool:
    """Whether XLA compiles what is traced here."""
    return engine.is_compiled_by_xla()


def add_at(total: tf.Tensor, indices: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """`total` with values added at indices, in its own memory where nobody else reads it.

    Not for XLA. `tf.tensor_scatter_nd_add` and its kin copy `total` on CPUs, always.
    """
    return tf.raw_ops.ScatterNdNonAliasingAdd(
        input=total, indices=indices, updates=values
    )


def cast_up(x: tf.Tensor) -> tf.Tensor:
    """`x` as a tensor of float32, or of float64 if it is that."""
    x = tf.convert_to_tensor(x)
    return tf.cast(x, at_least_float32(x.dtype))
