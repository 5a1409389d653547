"""Checks of the language model's parts and inputs."""

import keras
import tensorflow as tf

from keras_moe import checks
from keras_moe.layers.causality import verify_causal
from keras_moe.models.parts import as_layers


def as_middle(middle):
    """A list of layers, of which recurrent ones return what the model needs."""
    layers = as_layers(middle, "middle")
    for layer in layers:
        if isinstance(layer, keras.layers.RNN) and not (
            layer.return_sequences and layer.return_state
        ):
            raise ValueError(
                "A recurrent layer in `middle` must have return_sequences=True and "
                f"return_state=True. Received: layer {layer.name!r} with "
                f"return_sequences={layer.return_sequences}, "
                f"return_state={layer.return_state}."
            )
    verify_causal(layers, "middle", "MoELanguageModel")
    return layers


def verify_tokens(tokens, vocabulary_size, name="inputs"):
    """Token ids as int32, or an error if they are none."""
    if not isinstance(tokens, keras.KerasTensor):
        tokens = tf.cast(checks.verify_ids(tokens, name, vocabulary_size), tf.int32)
    if not tf.as_dtype(tokens.dtype).is_integer or len(tokens.shape) != 2:
        raise ValueError(
            f"`{name}` of a language model must be integer token ids of shape "
            f"(batch, time). Received: dtype={tf.as_dtype(tokens.dtype).name}, "
            f"shape={tuple(tokens.shape)}."
        )
    return tokens
