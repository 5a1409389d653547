"""Experts as a user writes them: subclasses of each layer of experts."""

import keras
import tensorflow as tf

from keras_moe import layers

register = keras.saving.register_keras_serializable(package="own")


@register
class GatedExperts(layers.Experts):
    """E(x) = (silu(x A) * x B) C, with weights of its own for every expert."""

    def __init__(self, num_experts, hidden_units, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.hidden_units = hidden_units

    def build(self, input_shape):
        features = self.verify_inputs(input_shape)
        self.add_expert_weight("gate", (features, self.hidden_units))
        self.add_expert_weight("value", (features, self.hidden_units))
        self.add_expert_weight(
            "output", (self.hidden_units, self.output_units or features)
        )

    def network(self, rows, gate, value, output):
        hidden = tf.nn.silu(tf.matmul(rows, gate)) * tf.matmul(rows, value)
        return tf.matmul(hidden, output)

    def get_config(self):
        return {**super().get_config(), "hidden_units": self.hidden_units}


@register
class ResidualExperts(layers.FeedForwardExperts):
    """Feed-forward experts that add their input: `network` alone is overridden."""

    def network(self, rows, *weights):
        return rows + super().network(rows, *weights)


@register
class HalvedExpertList(layers.ExpertList):
    """Another `call` around that of the base."""

    def call(self, inputs, counts=None, training=None):
        return 0.5 * super().call(inputs, counts=counts, training=training)
