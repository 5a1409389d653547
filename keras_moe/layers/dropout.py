"""Dropout that does not depend on the number of devices."""

import keras
import tensorflow as tf

from keras_moe import engine, functional


class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout` whose mask does not depend on the number of devices.

    On several devices that of Keras drops the same elements of the rows of each.
    """

    def build(self, input_shape):
        engine.note_layer()
        super().build(input_shape)

    def call(self, inputs, training=False):
        replicas = engine.current().replicas
        if replicas.number == 1 or not training or self.rate == 0:
            return super().call(inputs, training=training)
        num_rows = tf.shape(inputs)[0]
        width = tf.reduce_prod(tf.shape(inputs, tf.int64)[1:])
        uniform = functional.uniform_rows(
            self.seed_generator.next(),
            replicas.num_before(num_rows),
            num_rows,
            width,
            inputs.dtype,
        )
        kept = tf.reshape(uniform, tf.shape(inputs)) >= self.rate
        return tf.where(kept, inputs * (1 / (1 - self.rate)), tf.zeros_like(inputs))
