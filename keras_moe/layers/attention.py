"""The attention between encoder and decoder of a translation model."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.types import at_least_float32


@keras.saving.register_keras_serializable(package="keras_moe")
class MultiplicativeAttention(checks.FromConfig, keras.layers.Layer):
    """Attention whose scores are one matrix product over all pairs of positions.

    $A(x_i, y_j) = \\sum_d V_d \\tanh((x_i U)_d) \\tanh((y_j W)_d)$ (equation 22),
    where the additive attention of GNMT (equation 21) has the tanh of a sum, which
    must be formed for every pair. A softmax over the positions i gives the
    weights; the output for query j is the weighted mean of the memory.

    Args:
        units: Int or None. Width d of the comparison; None takes that of the
            memory. Defaults to `None`.
        kernel_initializer: Initial value of both kernels. Defaults to
            `"glorot_uniform"`.

    Call arguments:
        query: Float tensor `(batch, target, query features)`, y.
        memory: Float tensor `(batch, source, features)`, x.
        memory_mask: Bool tensor `(batch, source)` or None. Positions marked
            False (padding) get the weight 0.

    Input shape:
        Two tensors as above.

    Output shape:
        `(batch, target, features)`. With no position to attend to, zero.

    Losses and state:
        Weights `key_kernel` U `(features, units)`, `query_kernel` W
        `(query features, units)`, `scale` V `(units,)`, which starts at
        `units ** -0.5` (the paper does not say). No losses.

    Raises:
        ValueError: `units` is not positive; an input is not floating point or
            its last dimension is unknown.

    Mixed precision: the softmax runs in float32 at least.

    Example:

    >>> attention = keras_moe.layers.MultiplicativeAttention()
    >>> query, memory = np.ones((2, 3, 8), "float32"), np.ones((2, 5, 4), "float32")
    >>> attention(query, memory).shape.as_list()
    [2, 3, 4]

    Reference:
        Shazeer et al. 2017, appendix G; Wu et al. 2016, "Google's neural machine
        translation system".
    """

    def __init__(
        self,
        units: int | None = None,
        *,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.units = (
            None if units is None else checks.verify_positive_int(units, "units")
        )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.supports_masking = True

    def build(self, query_shape, memory_shape):
        engine.note_layer()
        name = type(self).__name__
        query_features = checks.verify_input_shape(query_shape, name)
        features = checks.verify_input_shape(memory_shape, name)
        units = self.units or features
        self.key_kernel = self.add_weight(
            name="key_kernel",
            shape=(features, units),
            initializer=self.kernel_initializer,
        )
        self.query_kernel = self.add_weight(
            name="query_kernel",
            shape=(query_features, units),
            initializer=self.kernel_initializer,
        )
        # Ones would let scores reach `units`: the softmax saturates on one position
        # early in training and gets no gradient from then on.
        self.scale = self.add_weight(
            name="scale",
            shape=(units,),
            initializer=keras.initializers.Constant(units**-0.5),
        )

    def call(self, query, memory, query_mask=None, memory_mask=None):
        for inputs in (query, memory):
            checks.verify_floating(inputs.dtype, type(self).__name__)
        weights = self.weights_of(query, self.keys_of(memory), memory_mask)
        return tf.matmul(weights, memory)

    def keys_of(self, memory) -> tf.Tensor:
        """What depends on the memory alone, to be computed once for many queries.

        Args:
            memory: Float tensor `(batch, source, features)`.

        Returns:
            `(batch, source, units)`.
        """
        return functional.attention_keys(
            memory, tf.convert_to_tensor(self.key_kernel), self.scale
        )

    def weights_of(self, query, keys, memory_mask=None) -> tf.Tensor:
        """The attention itself: how much each query takes of each position.

        Args:
            query: Float tensor `(batch, target, query features)`.
            keys: `(batch, source, units)`, from `keys_of`.
            memory_mask: Bool tensor `(batch, source)` or None.

        Returns:
            `(batch, target, source)`, in the layer's compute type. Rows sum to 1
            over the positions that are not masked.
        """
        scores = functional.attention_scores(
            query, keys, tf.convert_to_tensor(self.query_kernel)
        )
        mask = None if memory_mask is None else tf.cast(memory_mask, tf.bool)
        checks.verify_shape(keys.shape[:2], "that of the memory", memory_mask=mask)
        mask = None if mask is None else mask[:, tf.newaxis]
        # A half-precision softmax loses the small weights of long sources.
        exact = tf.cast(scores, at_least_float32(scores.dtype))
        weights = functional.masked_softmax(exact, mask)
        return tf.cast(weights, scores.dtype)

    def compute_mask(self, query, previous_mask=None):
        if isinstance(previous_mask, (list, tuple)):
            return previous_mask[0] if previous_mask else None
        return previous_mask

    def compute_output_shape(self, query_shape, memory_shape):
        return (*query_shape[:-1], memory_shape[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
