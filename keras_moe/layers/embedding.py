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
        # With half precision or low-rank adaptation it is a tensor made of the variable.
        table = getattr(self.embeddings, "value", None)
        is_here = engine.current().values_are_here  # a mesh shards it
        if isinstance(table, tf.Variable) and is_here:
            return tf.cast(tf.gather(table, inputs), self.compute_dtype)
        return super().call(inputs)
