"""The step of an LSTM."""

from collections.abc import Callable

import tensorflow as tf

from keras_moe import checks

Activation = Callable[[tf.Tensor], tf.Tensor]


def lstm_step(
    z: tf.Tensor,
    c: tf.Tensor,
    activation: Activation = tf.tanh,
    recurrent_activation: Activation = tf.sigmoid,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One step of an LSTM from its pre-activations.

    $c' = \\sigma(z_f) \\odot c + \\sigma(z_i) \\odot \\tanh(z_g)$,
    $h' = \\sigma(z_o) \\odot \\tanh(c')$

    Args:
        z: `(batch, 4 * units)` float, in the order i, f, g, o of Keras.
        c: `(batch, units)` float.
        activation: Function for g and for the state. Defaults to tanh.
        recurrent_activation: Function for i, f and o. Defaults to sigmoid.

    Returns:
        The next h and c, each `(batch, units)`.

    Reference:
        Hochreiter and Schmidhuber 1997; Gers et al. 2000 (forget gate).
    """
    *rows, units = c.shape
    shape = [*rows, units and 4 * units]
    checks.verify_shape(shape, "four values for each of `c`", z=z)
    i, f, g, o = tf.split(z, 4, axis=-1)
    c = recurrent_activation(f) * c + recurrent_activation(i) * activation(g)
    return recurrent_activation(o) * activation(c), c
