"""Kernels that are more than one tensor: in eight bits, with a low-rank addition."""

from typing import NamedTuple

import tensorflow as tf

from keras_moe.functional import expert_products
from keras_moe.functional.updated_kernels import ExpertKernel


class Kernel(NamedTuple):
    """What stands for the kernels of e experts in a product.

    $W = V / s + f \\, A B$

    V and s are not trained: no gradient reaches them, and none is computed. Without
    `low_rank` it is $V / s$, without `scale` $V + f \\, A B$.

    Attributes:
        value: V, `(e, in, out)`, float or int8.
        scale: s, `(e, out)`, or None.
        low_rank: A, `(e, in, r)`, and B, `(e, r, out)`, or None.
        factor: f, a number.
    """

    value: tf.Tensor
    scale: tf.Tensor | None = None
    low_rank: tuple[tf.Tensor, tf.Tensor] | None = None
    factor: float = 1.0


def product(x: tf.Tensor, kernel: tf.Tensor | Kernel | ExpertKernel) -> tf.Tensor:
    """Rows times kernel.

    The two thin products of a low-rank addition cost `r * (in + out)` operations a row.
    Adding A B to V first would cost `r * in * out` for each expert, room for another
    kernel, and a gradient of its size. Integers up to 127 are exact in every float type;
    their scale is applied to the result.

    Args:
        x: `(e, R, in)`.
        kernel: `(e, in, out)`, a `Kernel`, or an `ExpertKernel`.

    Returns:
        `(e, R, out)`, in the type of `x`.
    """
    if isinstance(kernel, ExpertKernel):
        return kernel.times(x)
    if not isinstance(kernel, Kernel):
        return expert_products.times(x, kernel)
    y = tf.matmul(x, tf.cast(tf.stop_gradient(kernel.value), x.dtype))
    if kernel.scale is not None:
        y = y / tf.stop_gradient(kernel.scale)[..., tf.newaxis, :]
    if kernel.low_rank is not None:
        a, b = (tf.cast(part, x.dtype) for part in kernel.low_rank)
        y = y + kernel.factor * tf.matmul(tf.matmul(x, a), b)
    return y


def merged(kernel: Kernel, dtype: tf.DType | str) -> tf.Tensor:
    """The kernel that it stands for, as one tensor `(e, in, out)` of this type."""
    w = tf.cast(tf.stop_gradient(kernel.value), dtype)
    if kernel.scale is not None:
        w = w / tf.cast(tf.stop_gradient(kernel.scale), dtype)[..., tf.newaxis, :]
    if kernel.low_rank is not None:
        a, b = (tf.cast(part, dtype) for part in kernel.low_rank)
        w = w + kernel.factor * tf.matmul(a, b)
    return w
