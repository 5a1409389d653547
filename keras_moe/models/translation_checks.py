"""Checks of the translation model's parts and inputs."""

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.layers.causality import verify_causal
from keras_moe.models.parts import as_layers


def as_middle(middle, name):
    """A list of layers that are not recurrent."""
    layers = as_layers(middle, name)
    for layer in layers:
        if isinstance(layer, keras.layers.RNN):
            raise ValueError(
                f"`{name}` must not be recurrent, since decoding carries the states of "
                f"the model's own LSTMs only. Received: layer {layer.name!r}, a "
                f"{type(layer).__name__}. Raise `encoder_lstms` or `decoder_lstms`."
            )
    if name == "decoder_middle":
        verify_causal(layers, name, "MoETranslator")
    return layers


def verify_distinct(encoder_middle, decoder_middle):
    """Raises if a layer stands in both, or two mixtures have one name."""
    layers = [*encoder_middle, *decoder_middle]
    names = [layer.name for layer in layers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            "`encoder_middle` and `decoder_middle` must be new layers with names of "
            f"their own, under which their balance is logged. Received: {twice} more "
            "than once. Give them a `name`."
        )


def verify_stack(encoder_lstms, decoder_lstms, middle_after):
    """`middle_after` as a tuple of two ints within the numbers of LSTMs."""
    sizes = (
        checks.verify_positive_int(encoder_lstms, "encoder_lstms"),
        checks.verify_positive_int(decoder_lstms, "decoder_lstms"),
    )
    numbers = np.array(middle_after)
    if (
        numbers.shape != (2,)
        or numbers.dtype.kind != "i"
        or not np.all((numbers >= 1) & (numbers <= sizes))
    ):
        raise ValueError(
            "`middle_after` must be two ints, from 1 to `encoder_lstms` and from 1 to "
            f"`decoder_lstms`. Received: middle_after={middle_after!r}, "
            f"encoder_lstms={sizes[0]}, decoder_lstms={sizes[1]}."
            " Lower it, or add LSTMs."
        )
    return tuple(numbers.tolist())


def verify_vocabulary(vocabulary, vocabulary_size):
    """Raises unless a vocabulary, if given, has the size stated."""
    if vocabulary is not None and len(vocabulary) != vocabulary_size:
        raise ValueError(
            "`vocabulary_size` must be the size of `vocabulary`. Received: "
            f"vocabulary_size={vocabulary_size}, len(vocabulary)={len(vocabulary)}. "
            "Pass len(vocabulary)."
        )


def split_inputs(inputs, vocabulary_size):
    """Source and target inputs, verified."""
    if not isinstance(inputs, (tuple, list)) or len(inputs) != 2:
        raise ValueError(
            "`inputs` of MoETranslator must be two tensors, source and target inputs. "
            f"Received: {type(inputs).__name__}"
            f"{f' of {len(inputs)}' if isinstance(inputs, (tuple, list)) else ''}. "
            "Pass (source, target_inputs)."
        )
    return [
        verify_ids(tensor, name, vocabulary_size)
        for name, tensor in zip(("source", "target inputs"), inputs, strict=True)
    ]


def verify_ids(tensor, name, vocabulary_size):
    """Token ids of rank 2 as a tensor, or an error if they are none."""
    if not isinstance(tensor, keras.KerasTensor):
        tensor = tf.convert_to_tensor(tensor)
    if not tf.as_dtype(tensor.dtype).is_integer or len(tensor.shape) != 2:
        raise ValueError(
            f"`inputs` of MoETranslator must be integer token ids of shape (batch, "
            f"length). Received: {name} with dtype={tf.as_dtype(tensor.dtype).name}, "
            f"shape={tuple(tensor.shape)}. Encode text with the vocabulary first."
        )
    if not isinstance(tensor, keras.KerasTensor):
        checks.verify_ids(tensor, name, vocabulary_size)
    return tensor


def verify_decoding(num_beams=4, length_penalty=0.2, max_length=100):
    """The options of a search, or an error if one is out of range."""
    return (
        checks.verify_int(num_beams, "num_beams"),
        checks.verify_number(length_penalty, "length_penalty"),
        checks.verify_int(max_length, "max_length"),
    )


def as_texts(texts, target_language, languages):
    """Lists of texts and of their target languages, of equal length."""
    listed = [texts] if isinstance(texts, str) else checks.verify_texts(texts, "texts")
    if target_language is None:
        if len(languages) != 1:
            raise ValueError(
                "`target_language` must be given to a model of several. Received: "
                f"target_language=None. Pass one of {', '.join(languages)}."
            )
        target_language = languages[0]
    if isinstance(target_language, str):
        wanted = [target_language] * len(listed)
    else:
        wanted = checks.verify_texts(target_language, "target_language")
    if len(wanted) != len(listed):
        raise ValueError(
            "`target_language` must be one, or one for each text. Received: "
            f"{len(wanted)} languages for {len(listed)} texts. Pass as many."
        )
    unknown = sorted(set(wanted) - set(languages))
    if unknown:
        raise ValueError(
            "`target_language` must be one that the model knows. Received: "
            f"{unknown[0]!r}. Pass one of {', '.join(languages)}."
        )
    return listed, wanted
