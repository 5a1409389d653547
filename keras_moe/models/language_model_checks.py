"""Checks of the language model's parts and inputs."""

from collections.abc import Sequence

import keras
import tensorflow as tf


def as_layers(middle):
    if middle is None:
        return []
    layers = list(middle) if isinstance(middle, Sequence) else [middle]
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                "`middle` must be a layer or a list of layers. "
                f"Received: {layer!r} in middle={middle!r}."
            )
        if isinstance(layer, keras.layers.RNN) and not (
            layer.return_sequences and layer.return_state
        ):
            raise ValueError(
                "A recurrent layer in `middle` must have return_sequences=True and "
                f"return_state=True. Received: layer {layer.name!r} with "
                f"return_sequences={layer.return_sequences}, "
                f"return_state={layer.return_state}."
            )
    return layers


def state_sizes(layer):
    sizes = layer.cell.state_size
    return sizes if isinstance(sizes, (list, tuple)) else [sizes]


def verify_width(width, layer, units):
    if width != units:
        raise ValueError(
            f"Layer {layer.name!r} in `middle` must give `units` features, for the "
            f"residual. Received: {width} features, units={units}. Leave out "
            "`output_units` of its experts."
        )


def verify_tokens(tokens):
    if not tf.as_dtype(tokens.dtype).is_integer or len(tokens.shape) != 2:
        raise ValueError(
            "`inputs` of MoELanguageModel must be integer token ids of shape "
            f"(batch, time). Received: dtype={tf.as_dtype(tokens.dtype).name}, "
            f"shape={tuple(tokens.shape)}."
        )


def verify_lstm_layers(lstm_layers):
    if lstm_layers not in (1, 2):
        raise ValueError(
            f"`lstm_layers` must be 1 or 2. Received: lstm_layers={lstm_layers!r}. "
            "Put further recurrent layers into `middle`."
        )
