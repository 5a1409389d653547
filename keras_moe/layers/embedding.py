"""The embedding of the models."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import engine


class Embedding(keras.layers.Embedding):
    """`keras.layers.Embedding` that reads the rows of its ids from the variable.

    Keras' layer reads the whole table first. TensorFlow copies what it reads of a
    variable once a sparse update has been made of it, so that a table of 32,000 words
    was copied in every step.

    Args:
        *args: As of Keras' layer.
        of_words: Bool. Whether ids are words, of a vocabulary that several devices may
            share out. Defaults to `True`.
        **kwargs: As of Keras' layer.
    """

    def __init__(self, *args: Any, of_words: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.of_words = of_words

    def build(self, input_shape=None):
        adapted = self.quantization_mode or self.lora_rank
        ruled = self.embeddings_regularizer or self.embeddings_constraint
        is_built = getattr(self, "_embeddings", None) is not None
        if is_built or adapted or ruled or not self.of_words:
            super().build(input_shape)
            return
        self._embeddings = engine.for_weights().weights.add_table_weight(
            self,
            (self.input_dim, self.output_dim),
            self.embeddings_initializer,
            "embeddings",
        )
        self.built = True

    @property
    def vocabulary(self) -> Any:
        """How to use the table if its words are shared out here, else None."""
        return engine.current().vocabulary_of(getattr(self, "_embeddings", None))

    def call(self, inputs):
        vocabulary = self.vocabulary
        if vocabulary is not None:
            (rows,) = vocabulary.rows([self._embeddings], inputs)
            return tf.cast(rows, self.compute_dtype)
        # With half precision or low-rank adaptation it is a tensor made of the variable.
        table = getattr(self.embeddings, "value", None)
        is_here = engine.current().values_are_here  # a mesh shards it
        if isinstance(table, tf.Variable) and is_here:
            return tf.cast(tf.gather(table, inputs), self.compute_dtype)
        return super().call(inputs)

    def get_config(self):
        return {**super().get_config(), "of_words": self.of_words}
