"""The full softmax of the models: scores of all words."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import engine, functional


# Named as the layer that it was in earlier versions: files of weights go by the name.
class Dense(keras.layers.Dense):
    """`keras.layers.Dense` whose units are words, which several devices may share out.

    Then a device has some columns of the kernel and of the bias, and scores of its own rows are
    brought together from all devices. `losses_of` needs no more than a few numbers of
    each row from the others.
    """

    def build(self, input_shape):
        adapted = self.quantization_mode or self.lora_rank
        rules = [self.kernel_regularizer, self.kernel_constraint]
        rules += [self.bias_regularizer, self.bias_constraint]
        if adapted or any(rules) or not self.use_bias:
            super().build(input_shape)
            return
        features = input_shape[-1]
        add_table_weight = engine.for_weights().weights.add_table_weight
        self._kernel = add_table_weight(
            self, (features, self.units), self.kernel_initializer, "kernel", axis=1
        )
        self.bias = add_table_weight(self, (self.units,), self.bias_initializer, "bias")
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        self.built = True

    @property
    def vocabulary(self) -> Any:
        """How to use the kernel if its words are shared out here, else None."""
        return engine.current().vocabulary_of(getattr(self, "_kernel", None))

    def call(self, inputs, training=None):
        vocabulary = self.vocabulary
        if vocabulary is None:
            return super().call(inputs, training)
        inputs = tf.cast(inputs, self.compute_dtype)
        return vocabulary.logits(inputs, self._kernel, self.bias)

    def losses_of(self, inputs: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Cross-entropy of targets under the softmax of the scores.

        Args:
            inputs: `(..., features)`.
            targets: Ints of the leading dimensions.

        Returns:
            Losses of the leading dimensions.
        """
        vocabulary = self.vocabulary
        if vocabulary is not None:
            inputs = tf.cast(inputs, self.compute_dtype)
            return vocabulary.cross_entropy(inputs, self._kernel, self.bias, targets)
        scores = tf.reshape(self(inputs), [-1, self.units])
        losses = functional.cross_entropy(scores, tf.reshape(targets, [-1]))
        return tf.reshape(losses, tf.shape(inputs)[:-1])
