"""Keras metrics."""

import keras
import tensorflow as tf

from keras_moe import losses


@keras.saving.register_keras_serializable(package="keras_moe")
class Perplexity(keras.metrics.MeanMetricWrapper):
    """Exponential of the mean cross-entropy over all tokens, weighted.

    $\\exp\\left(-\\frac{\\sum_t w_t \\log p(y_t)}{\\sum_t w_t}\\right)$

    Args:
        name: String. Defaults to `"perplexity"`.
        dtype: Data type of the result. Defaults to `None`.
        from_logits: Bool. Whether predictions are logits. Defaults to `True`.

    Example:

    >>> metric = keras_moe.telemetry.Perplexity()
    >>> metric.update_state(np.array([[1, 2]]), np.zeros((1, 2, 4), "float32"))
    >>> round(float(metric.result()), 3)
    4.0
    """

    def __init__(self, name="perplexity", dtype=None, from_logits=True):
        function = losses.TokenCrossentropy(from_logits, reduction=None).call
        super().__init__(function, name=name, dtype=dtype)
        self.from_logits = from_logits
        if from_logits:  # can be made of the losses of tokens, in place of logits
            self.takes_losses = True

    def result(self):
        return tf.exp(super().result())

    def get_config(self):
        return {
            "name": self.name,
            "dtype": self.dtype,
            "from_logits": self.from_logits,
        }
