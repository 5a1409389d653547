"""The update of weights whose second moment is kept in factors, block by block."""

import tensorflow as tf

from keras_moe import engine

# Bytes of weights that are updated at a time, at least, and most parts of a stack. What
# an update computes of a block should stay in the cache.
_BLOCK_BYTES, _MOST_BLOCKS = 1 << 21, 128


def blocks_of(shape: tf.TensorShape, itemsize: int) -> list[slice]:
    """Runs of experts whose weights are updated at a time.

    Args:
        shape: `(E, ..., in, out)`, of the weights.
        itemsize: Bytes of an element.

    Returns:
        Slices of the first axis; one of all of it for a single matrix.
    """
    size, rest = shape[0], shape[1:]
    one = itemsize * rest.num_elements()
    block = max(1, -(-size // _MOST_BLOCKS), _BLOCK_BYTES // max(1, one))
    if len(rest) < 2 or block >= size:
        return [slice(0, size)]
    return [slice(i, min(i + block, size)) for i in range(0, size, block)]


def factored_step(
    gradient: tf.Tensor,
    row: tf.Tensor,
    column: tf.Tensor,
    step: tf.Tensor,
    learning_rate: tf.Tensor,
    beta_2: float,
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """One step of a weight, or of some experts' part of it.

    Args:
        gradient: `(..., in, out)`.
        row: `(..., in)`, the averages over rows.
        column: `(..., out)`, those over columns.
        step: `()`. Number of this step, from 1.
        learning_rate: `()`.
        beta_2: Decay of the averages.
        epsilon: Added to the root of the second moment.

    Returns:
        What to subtract, the new averages over rows, and over columns.

    Reference:
        Shazeer et al. 2017, appendix D.
    """
    beta = tf.constant(beta_2, gradient.dtype)
    squared = tf.square(gradient)
    row, column = (
        old + (1 - beta) * (tf.reduce_mean(squared, axis=axis) - old)
        for old, axis in ((row, -1), (column, -2))
    )
    # The roots of the factors first: no second array of the weight's size,
    # and no product that underflows. An expert without any gradient so far
    # has zeros everywhere: 0 / epsilon.
    mean = tf.reduce_mean(row, axis=-1, keepdims=True)
    by_row = tf.sqrt(tf.math.divide_no_nan(row, mean))[..., :, tf.newaxis]
    by_column = tf.sqrt(column / (1 - beta ** tf.cast(step, beta.dtype)))
    rate = tf.cast(learning_rate, gradient.dtype)
    move = rate * gradient / (by_row * by_column[..., tf.newaxis, :] + epsilon)
    return move, row, column


def subtract_from(variable: tf.Variable, part: slice, value: tf.Tensor) -> tf.Operation:
    """Subtracts from some experts' part of a weight, where it lies.

    Args:
        variable: `(E, ...)`.
        part: A run of experts.
        value: What to subtract from their part.

    Returns:
        The operation, None outside of a graph.
    """
    if not writes_in_place():
        return variable[part].assign(variable[part] - value)
    # A slice that is assigned reads the weight.
    return subtract_rows(variable, tf.range(part.start, part.stop), value)


def subtract_rows(
    variable: tf.Variable, rows: tf.Tensor, value: tf.Tensor
) -> tf.Operation:
    """Subtracts from rows of a weight, where it lies: see `end_of_writes`.

    Args:
        variable: `(E, ...)`.
        rows: `(n,)` int, no row twice.
        value: `(n, ...)`, what to subtract from them.

    Returns:
        The operation, None outside of a graph.
    """
    # `ResourceScatterSub` would take one thread, and 1.2 to 2.6 times as long.
    return tf.raw_ops.ResourceScatterNdSub(
        ref=variable.handle, indices=rows[:, tf.newaxis], updates=value
    )


def end_of_writes(variable: tf.Variable) -> None:
    """After writes of rows, from which on reading a variable copies all of it: no more."""
    if writes_in_place():
        tf.raw_ops.DisableCopyOnRead(resource=variable.handle)


def writes_in_place() -> bool:
    """Whether rows of a variable can be written by themselves: not on a mesh, nor by XLA."""
    return not engine.current().unrolls_loops and not engine.is_compiled_by_xla()
