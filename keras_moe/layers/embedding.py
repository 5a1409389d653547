"""The embedding of the models."""

import keras
import tensorflow as tf

from keras_moe import engine


class Embedding(keras.layers.Embedding):
    """`keras.layers.Embedding` that reads the rows of its ids from the variable.

    Keras' layer reads the whole table first. TensorFlow copies what it reads of a
    variable once a sparse update has been made of it, so that a table of 32,000 words
    was copied in every step.
    """

    def call(self, inputs):
        table = self.embeddings.value
        # A mesh shards the table; with half precision `value` is a copy as it is.
        if not (isinstance(table, tf.Variable) and engine.current().values_are_here):
            return super().call(inputs)
        if self.lora_enabled:
            return super().call(inputs)
        return tf.cast(tf.gather(table, inputs), self.compute_dtype)
