"""Experts and gates as a user writes them, with no word about devices."""

import keras
import tensorflow as tf

from keras_moe import functional, layers

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
class ResidualGatedExperts(layers.GatedExperts):
    """The same of gated experts, with dropout."""

    def network(self, rows, *weights):
        return rows + super().network(rows, *weights)


@register
class HalvedExpertList(layers.ExpertList):
    """Another `call` around that of the base."""

    def call(self, inputs, counts=None, training=None):
        return 0.5 * super().call(inputs, counts=counts, training=training)


@register
class StockExperts(keras.layers.Layer):
    """Matrices of Keras, one an expert, by the contract of rows and counts alone."""

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.num_experts, input_shape[-1], input_shape[-1]),
            initializer=keras.initializers.RandomNormal(stddev=0.3, seed=2),
        )

    def call(self, inputs, counts=None):
        kernels = tf.unstack(tf.convert_to_tensor(self.kernel))
        if inputs.shape.rank == 3:
            parts = tf.unstack(inputs, num=self.num_experts)
        else:
            parts = tf.split(inputs, counts, num=self.num_experts)
        answers = [tf.matmul(x, w) for x, w in zip(parts, kernels, strict=True)]
        join = tf.stack if inputs.shape.rank == 3 else tf.concat
        return tf.tanh(join(answers, axis=0))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


@register
class HashGating(keras.layers.Layer):
    """One expert, by the first feature in tenths. Nothing to learn."""

    num_experts = None

    def call(self, inputs, mask=None, training=None):
        bucket = tf.cast(tf.round(inputs[:, :1] * 10.0), tf.int32)
        experts = tf.math.floormod(bucket, self.num_experts)
        gates = tf.ones_like(inputs[:, :1])
        return functional.make_gating_result(
            gates, experts, self.num_experts, mask=mask
        )


class _OneKernel(keras.layers.Layer):
    """A gate whose logits are one product."""

    num_experts = None

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.num_experts),
            initializer=keras.initializers.GlorotUniform(seed=3),
        )


@register
class StockGating(_OneKernel):
    """The two best of a softmax, by TensorFlow's own operations, with a z-loss."""

    def call(self, inputs, mask=None, training=None):
        logits = tf.matmul(inputs, self.kernel)
        probabilities = tf.nn.softmax(logits)
        gates, experts = tf.math.top_k(probabilities, k=2)
        result = functional.make_gating_result(
            gates / tf.reduce_sum(gates, axis=-1, keepdims=True),
            experts,
            self.num_experts,
            load=tf.reduce_sum(probabilities, axis=0),
            mask=mask,
        )
        z = tf.reduce_mean(tf.square(tf.reduce_logsumexp(logits, axis=-1)))
        return result._replace(auxiliary_losses=(0.01 * z,))


@register
class AboveGating(_OneKernel):
    """All experts above the mean of a token's softmax, three at most: any number."""

    most_experts = 3
    supports_masking = True

    def call(self, inputs, mask=None, training=None):
        gates = tf.nn.softmax(4.0 * tf.matmul(inputs, self.kernel))
        return functional.make_selection_result(
            gates,
            gates > 1.0 / self.num_experts,
            most_experts=self.most_experts,
            mask=mask,
        )


@register
class AssignmentsGating(_OneKernel):
    """As `AboveGating` without a limit, as a list of assignments of open length."""

    supports_masking = True

    def call(self, inputs, mask=None, training=None):
        gates = tf.nn.softmax(4.0 * tf.matmul(inputs, self.kernel))
        selected = gates > 1.0 / self.num_experts
        if mask is not None:
            selected &= mask[:, tf.newaxis]
        assignments = tf.where(selected)
        return functional.make_gating_result(
            tf.gather_nd(gates, assignments),
            tf.cast(assignments[:, 1], tf.int32),
            self.num_experts,
            token_indices=tf.cast(assignments[:, 0], tf.int32),
        )
