"""Random numbers by position: any part of a large draw, without the rest."""

import tensorflow as tf

_PHILOX = 1


def normal_rows(
    seed: tf.Tensor,
    first_row: tf.Tensor | int,
    num_rows: tf.Tensor | int,
    width: int,
    dtype: tf.DType | str = tf.float32,
) -> tf.Tensor:
    """Some consecutive rows of `keras.random.normal((any, width), seed=...)`.

    The generator (Philox) gives its numbers four at a time, each group by its
    number alone. So a row can be drawn by its position.

    Args:
        seed: `(2,)` integer, the state that a `keras.random.SeedGenerator` gives.
        first_row: `()` integer. The first row to draw.
        num_rows: `()` integer. Rows to draw.
        width: Numbers in a row.
        dtype: Float type. Defaults to `tf.float32`.

    Returns:
        `(num_rows, width)`, equal to rows `first_row` to `first_row + num_rows`
        of the whole draw on CPU and GPU.
    """
    return _rows(
        tf.raw_ops.StatelessRandomNormalV2, seed, first_row, num_rows, width, dtype
    )


def uniform_rows(
    seed: tf.Tensor,
    first_row: tf.Tensor | int,
    num_rows: tf.Tensor | int,
    width: tf.Tensor | int,
    dtype: tf.DType | str = tf.float32,
) -> tf.Tensor:
    """Some consecutive rows of `keras.random.uniform((any, width), seed=...)`.

    Args:
        seed: `(2,)` integer, the state that a `keras.random.SeedGenerator` gives.
        first_row: `()` integer. The first row to draw.
        num_rows: `()` integer. Rows to draw.
        width: `()` integer. Numbers in a row.
        dtype: Float type. Defaults to `tf.float32`.

    Returns:
        `(num_rows, width)` within [0, 1), equal to rows `first_row` to
        `first_row + num_rows` of the whole draw on CPU and GPU.
    """
    return _rows(
        tf.raw_ops.StatelessRandomUniformV2, seed, first_row, num_rows, width, dtype
    )


def _rows(draw, seed, first_row, num_rows, width, dtype):
    dtype = tf.as_dtype(dtype)
    # As in Keras, whose state is int64 while TensorFlow's seeds are int32.
    seed = tf.cast(tf.math.floormod(tf.cast(seed, tf.int64), tf.int32.max - 1), "int32")
    key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    group = 2 if dtype == tf.float64 else 4
    width = tf.cast(width, tf.int64)
    start = tf.cast(first_row, tf.int64) * width
    size = tf.cast(num_rows, tf.int64) * width
    skipped = start % group
    moved = counter + tf.cast(tf.stack([start // group, 0]), tf.uint64)
    drawn = draw(
        shape=[size + skipped], key=key, counter=moved, alg=_PHILOX, dtype=dtype
    )
    return tf.reshape(drawn[skipped:], tf.stack([tf.cast(num_rows, tf.int64), width]))
