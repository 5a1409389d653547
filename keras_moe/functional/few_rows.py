"""Products of few rows with a large kernel, as they are fastest on CPUs.

Where TensorFlow does without oneDNN, the product of rows with a transposed kernel repacks
all of the kernel: with 64 rows it takes 2 to 3 times as long as the product of the forward
pass, with 4 rows 5 times. The kernel times the transposed rows repacks the rows instead.
With many rows it is the slower of the two.
"""

import tensorflow as tf

from keras_moe import runtime

# Measured with 2 threads and kernels of 128 x 256 (no gain) to 512 x 1024: with 256 rows
# 1.14 times as fast, with 512 rows 0.94, with 1024 rows 0.75.
_MOST_ROWS = 256
_LEAST_SIZE = 2**17


def times(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Rows times the kernel of one expert.

    Args:
        x: `(1, R, in)` float.
        kernel: `(1, in, out)`, of the same type.

    Returns:
        `(1, R, out)`.
    """
    if not _repacks(kernel):
        return tf.matmul(x, kernel)

    @tf.custom_gradient
    def run(x, kernel):
        def grad(dy):
            return gradient_of_rows(dy, kernel), tf.matmul(x, dy, transpose_a=True)

        return tf.matmul(x, kernel), grad

    return run(x, kernel)


def gradient_of_rows(dy: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The gradient of x in `times`: dy times the transposed kernel.

    Args:
        dy: `(1, R, out)` float.
        kernel: `(1, in, out)`, of the same type.

    Returns:
        `(1, R, in)`.
    """
    if not _repacks(kernel):
        return tf.matmul(dy, kernel, transpose_b=True)
    # One of the two parts is empty. A condition would do, too, but an optimizer could not
    # tell when the products in it have read the kernel.
    rows = tf.shape(dy)[1]
    few = tf.where(rows <= _MOST_ROWS, rows, 0)
    turned = tf.matmul(kernel, dy[:, :few], transpose_b=True)
    straight = tf.matmul(dy[:, few:], kernel, transpose_b=True)
    return tf.concat([tf.transpose(turned, [0, 2, 1]), straight], axis=1)


def _repacks(kernel):
    return (
        kernel.dtype == tf.float32
        and kernel.shape[0] == 1
        and kernel.shape.num_elements() >= _LEAST_SIZE
        and runtime.device_type() == "CPU"
        and not runtime.uses_onednn()
    )
