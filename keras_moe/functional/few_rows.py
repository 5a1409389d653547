"""Fewer rows than experts: row by row, each with its own expert's weights.

Decoding hands a layer one token, or one for each beam. Then most experts have no row, and
what a graph does for each expert takes the time. Blocks would copy the kernels that are used,
which takes longer than reading them. A slice of one expert shares the memory of all, if its
size is a multiple of the alignment of TensorFlow's arrays (64 bytes).
"""

from collections.abc import Sequence

import tensorflow as tf

from keras_moe import runtime
from keras_moe.functional import ops
from keras_moe.functional.recomputation import Network, gradients_of

# Measured: from so many experts a row on it is not slower than one by one or in blocks, for
# kernels of 128 x 256 as of 512 x 1024, and up to so many rows.
_EXPERTS_A_ROW, _MOST_ROWS = 16, 16


def are_few(rows: tf.Tensor, num_experts: int) -> bool:
    """Whether there are so few rows, known when the graph is made.

    Args:
        rows: `(M, ...)`.
        num_experts: E.
    """
    number = rows.shape[0]
    return (
        number is not None
        and 0 < number <= min(_MOST_ROWS, num_experts // _EXPERTS_A_ROW)
        # Elsewhere the host would have to wait for the number of each expert.
        and runtime.device_type() == "CPU"
        and not ops.is_compiled_by_xla()
        and not runtime.only_plain()
    )


def run_row_by_row(
    network: Network, rows: tf.Tensor, weights: Sequence[tf.Tensor], counts: tf.Tensor
) -> tf.Tensor:
    """Runs experts on rows sorted by expert, one row after the other.

    Args:
        network: As for `run_experts`.
        rows: `(M, D)`, M known.
        weights: Tensors `(E, ...)`.
        counts: `(E,)` int32, rows of each expert.

    Returns:
        `(M, out)`.
    """
    each = tf.range(rows.shape[0], dtype=counts.dtype)
    owners = tf.searchsorted(tf.cumsum(counts), each, side="right")

    def own(values):
        """The weights of each row."""
        return [[v[e : e + 1] for v in values] for e in tf.unstack(owners)]

    @tf.custom_gradient
    def run(rows, *weights):
        def grad(dy):
            found = [
                gradients_of(network, x, mine, d)
                for x, mine, d in zip(_each(rows), own(weights), _each(dy), strict=True)
            ]
            d_rows, *d_weights = zip(*found, strict=True)
            return tf.concat([d[0] for d in d_rows], axis=0), *(
                None if of_rows[0] is None else together(of_rows, weight)
                for of_rows, weight in zip(d_weights, weights, strict=True)
            )

        def together(of_rows, weight):
            of_rows = tf.concat(list(of_rows), axis=0)
            return tf.math.unsorted_segment_sum(of_rows, owners, weight.shape[0])

        answers = [
            network(x, *mine)[0]
            for x, mine in zip(_each(rows), own(weights), strict=True)
        ]
        return tf.concat(answers, axis=0), grad

    return run(rows, *weights)


def _each(rows):
    """`(M, ...)` -> M of `(1, 1, ...)`."""
    return [row[tf.newaxis] for row in tf.split(rows, rows.shape[0])]
