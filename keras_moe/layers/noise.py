"""Noise that does not depend on the number of devices."""

import keras
import tensorflow as tf

from keras_moe import functional, placement


def draw_rows(num_rows, width, dtype, seed_generator, first_row=None, mask=None):
    """Standard normal rows, one for each token of this device.

    On several devices they are those that one device would draw for the same
    tokens of the global batch, whichever device they are on.

    Args:
        num_rows: Int or `()` int32.
        width: Int. Features of a row.
        dtype: Float type.
        seed_generator: `keras.random.SeedGenerator`, in the same state everywhere.
        first_row: `()` int32. Rows before these, over all devices. None means
            the tokens of the devices before this one. Defaults to `None`.
        mask: `(num_rows,)` bool or None. Where tokens marked False are still among
            the rows (on a mesh, with a capacity), the others get the rows they would
            have by themselves. Defaults to `None`.

    Returns:
        `(num_rows, width)`.
    """
    place = placement.for_call()
    if place.num_replicas == 1:
        noise = keras.random.normal((num_rows, width), dtype=dtype, seed=seed_generator)
        return place.noise_of(noise, mask)
    if first_row is None:
        first_row = place.num_before(num_rows)
    return functional.normal_rows(
        seed_generator.next(), first_row, num_rows, width, dtype
    )


class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout` whose mask does not depend on the number of devices.

    On several devices that of Keras drops the same elements of the rows of each.
    """

    def call(self, inputs, training=False):
        place = placement.for_call()
        if place.num_replicas == 1 or not training or self.rate == 0:
            return super().call(inputs, training=training)
        num_rows = tf.shape(inputs)[0]
        width = tf.reduce_prod(tf.shape(inputs, tf.int64)[1:])
        uniform = functional.uniform_rows(
            self.seed_generator.next(),
            place.num_before(num_rows),
            num_rows,
            width,
            inputs.dtype,
        )
        kept = tf.reshape(uniform, tf.shape(inputs)) >= self.rate
        return tf.where(kept, inputs * (1 / (1 - self.rate)), tf.zeros_like(inputs))
