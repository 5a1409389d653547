"""Adam in one pass over weight, moments and gradient."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import updating

_DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def can_be_applied(variable: Any, gradient: tf.Tensor) -> bool:
    """Whether TensorFlow's own kernel can update a variable where it lies.

    On several devices, under XLA, which makes one pass of the operations by itself, and
    for other types it is left to Keras.

    Args:
        variable: A variable in an optimizer's step.
        gradient: Dense.
    """
    return (
        updating.is_on_one_device()
        and hasattr(resource_of(variable), "handle")
        and tf.as_dtype(variable.dtype) == gradient.dtype
        and gradient.dtype in _DTYPES
    )


def apply(
    variable: Any,
    momentum: Any,
    velocity: Any,
    gradient: tf.Tensor,
    learning_rate: Any,
    step: tf.Tensor,
    optimizer: keras.optimizers.Adam,
) -> None:
    """Updates a variable and its moments in place, with the formula of Keras.

    $m \\leftarrow m + (1 - \\beta_1)(g - m)$, $v \\leftarrow v + (1 - \\beta_2)(g^2 -
    v)$, $w \\leftarrow w - \\eta \\frac{\\sqrt{1 - \\beta_2^t}}{1 - \\beta_1^t}
    \\frac{m}{\\sqrt{v} + \\epsilon}$.

    Keras writes it as a dozen operations, each with a new array of the size of the
    weight.

    Args:
        variable: The weight.
        momentum: m, of its shape and type.
        velocity: v, of its shape and type.
        gradient: Dense, of its shape and type.
        learning_rate: A number.
        step: `()`. Number of this step, t, from 1.
        optimizer: Has `beta_1`, `beta_2` and `epsilon`.

    Reference:
        Kingma and Ba 2015, "Adam: a method for stochastic optimization", end of section 2.
    """
    dtype = gradient.dtype
    beta_1, beta_2, epsilon = (
        tf.constant(number, dtype)
        for number in (optimizer.beta_1, optimizer.beta_2, optimizer.epsilon)
    )
    # Powers as Keras takes them: in the type of the weight.
    step = tf.cast(step, dtype)
    tf.raw_ops.ResourceApplyAdam(
        var=resource_of(variable).handle,
        m=resource_of(momentum).handle,
        v=resource_of(velocity).handle,
        beta1_power=tf.pow(beta_1, step),
        beta2_power=tf.pow(beta_2, step),
        lr=tf.cast(learning_rate, dtype),
        beta1=beta_1,
        beta2=beta_2,
        epsilon=epsilon,
        grad=gradient,
        use_locking=True,
    )


def resource_of(variable: Any) -> Any:
    """The TensorFlow variable of a Keras variable, or the one that is given."""
    return variable._value if isinstance(variable, keras.Variable) else variable
