"""Losses of Keras, made for large vocabularies."""

import keras
import tensorflow as tf

from keras_moe import functional
from keras_moe.functional.full_softmax import are_losses


@keras.saving.register_keras_serializable(package="keras_moe")
class TokenCrossentropy(keras.losses.SparseCategoricalCrossentropy):
    """`keras.losses.SparseCategoricalCrossentropy` of logits, in less time on CPUs.

    Values and gradients are those of Keras' loss, whose kernel for CPUs takes five times
    as long (with the gradient three times): for a vocabulary of some thousand words a
    good part of a step. See `functional.cross_entropy`.

    Args:
        from_logits: Bool. Whether predictions are logits; probabilities are left to
            Keras. Defaults to `True`.
        **kwargs: As of Keras' loss: `ignore_class`, `reduction`, `name`, `dtype`.

    Example:

    >>> loss = keras_moe.losses.TokenCrossentropy()
    >>> round(float(loss(np.array([[1, 2]]), np.zeros((1, 2, 4), "float32"))), 4)
    1.3863
    """

    def __init__(self, from_logits: bool = True, **kwargs):
        super().__init__(from_logits=from_logits, **kwargs)

    def call(self, y_true, y_pred):
        if are_losses(y_pred):  # words are on several devices, and no logits are made
            return y_pred
        y_pred = tf.convert_to_tensor(y_pred)
        config = self.get_config()
        usual = config["from_logits"] and config.get("ignore_class") is None
        if not usual or config.get("axis", -1) not in (-1, y_pred.shape.rank - 1):
            return super().call(y_true, y_pred)
        return _of_tokens(y_true, y_pred)


def _of_tokens(targets, logits):
    """Ids `(...)` or `(..., 1)` of any type, logits `(..., V)` -> `(...)`."""
    targets = tf.cast(tf.convert_to_tensor(targets), tf.int32)
    if targets.shape.rank == logits.shape.rank and targets.shape[-1] == 1:
        targets = tf.squeeze(targets, axis=-1)  # as Keras does it
    losses = functional.cross_entropy(
        tf.reshape(logits, (-1, logits.shape[-1])), tf.reshape(targets, (-1,))
    )
    return tf.reshape(losses, tf.shape(logits)[:-1])
