"""Products of the rows of one expert with its kernel, as they are fastest on CPUs.

The same three products can be had in several ways, and TensorFlow's are far apart. A
batched product of a batch of one is split among threads in another way than a plain one: with
oneDNN it took 2.5 times as long where kernels are small, up to 128 x 256. A plain product
with a transposed kernel repacks all of the kernel: with 64 rows and a kernel of 512 x 1024 it
took 2.4 times as long as the batch of one with oneDNN. Without oneDNN both repack it. There the
kernel times the transposed rows, which repacks the rows instead, takes half of the time, as
long as the rows are few.
"""

import tensorflow as tf

from keras_moe import runtime

# Measured with 2 threads. Elements of a kernel from which on its transpose is not for a plain
# product, with oneDNN and without.
_LARGE, _LARGE_WITHOUT = 2**18, 2**17
# With 256 rows the transposed rows are 1.14 times as fast, with 512 rows 0.94 times.
_FEW_ROWS = 256


def times(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Rows times kernels.

    Args:
        x: `(e, R, in)` float, or `(R, in)`.
        kernel: `(e, in, out)`, of the same type, or `(in, out)`.

    Returns:
        `(e, R, out)` or `(R, out)`.
    """
    shape = kernel.shape
    is_of_one = shape.is_fully_defined() and shape[:-2].num_elements() == 1
    # Other runtimes get one expert at a time, and need no gradients.
    is_for_others = shape.rank == 2 and runtime.only_plain()
    if not is_of_one or is_for_others or _elsewhere():
        return tf.matmul(x, kernel)

    @tf.custom_gradient
    def run(x, kernel):
        def grad(dy):
            return gradient_of_rows(dy, kernel), gradient_of_kernel(x, dy, kernel)

        return _plain(x, kernel), grad

    return run(x, kernel)


def gradient_of_rows(dy: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The gradient of x in `times`, of one expert.

    Args:
        dy: `(1, R, out)` float, or `(R, out)`.
        kernel: `(1, in, out)`, of the same type, or `(in, out)`.

    Returns:
        `(1, R, in)` or `(R, in)`.
    """
    size = kernel.shape.num_elements()
    if _elsewhere() or (runtime.uses_onednn() and size >= _LARGE):
        return _batched(dy, kernel, transpose_b=True)
    if runtime.uses_onednn() or size < _LARGE_WITHOUT:
        return _plain(dy, kernel, transpose_b=True)
    # One of the two parts is empty. A condition would do, too, but an optimizer could not
    # tell when the products in it have read the kernel.
    rows = tf.shape(dy)[-2]
    few = tf.where(rows <= _FEW_ROWS, rows, 0)
    turned = _batched(kernel, dy[..., :few, :], transpose_b=True)
    straight = _batched(dy[..., few:, :], kernel, transpose_b=True)
    return tf.concat([tf.linalg.matrix_transpose(turned), straight], axis=-2)


def gradient_of_kernel(x: tf.Tensor, dy: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The gradient of the kernel in `times`, of one expert.

    Args:
        x: `(1, R, in)` float, or `(R, in)`.
        dy: `(1, R, out)`, of the same type, or `(R, out)`.
        kernel: `(1, in, out)` or `(in, out)`; only its shape counts.

    Returns:
        `(1, in, out)` or `(in, out)`.
    """
    large = kernel.shape.num_elements() >= _LARGE_WITHOUT
    if _elsewhere() or (large and not runtime.uses_onednn()):
        return _batched(x, dy, transpose_a=True)
    return _plain(x, dy, transpose_a=True)


def _plain(a, b, **transposed):
    """The product of two matrices, or of two batches of one without the batch."""
    if a.shape.rank == 2:
        return tf.matmul(a, b, **transposed)
    product = tf.matmul(tf.squeeze(a, 0), tf.squeeze(b, 0), **transposed)
    return tf.expand_dims(product, 0)


def _batched(a, b, **transposed):
    """The product of two batches of one, or of two matrices as such batches."""
    if a.shape.rank == 3:
        return tf.matmul(a, b, **transposed)
    product = tf.matmul(tf.expand_dims(a, 0), tf.expand_dims(b, 0), **transposed)
    return tf.squeeze(product, 0)


def _elsewhere():
    return runtime.device_type() != "CPU"
