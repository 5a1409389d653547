"""The functions that a model is exported with."""

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_moe.layers.moe import MoE
from keras_moe.layers.routing_record import recorded_routing
from keras_moe.models.language_model import MoELanguageModel
from keras_moe.models.translation import MoETranslator
from keras_moe.serving.language_model import language_model_signatures
from keras_moe.serving.signature import routing_outputs, signature
from keras_moe.serving.text import TextCodec
from keras_moe.serving.translate import translation_signatures


def signatures_of(model: keras.Model, text: TextCodec | None) -> dict[str, Callable]:
    """Every signature that a model can have.

    Args:
        model: A built Keras model.
        text: `TextCodec` for a language model, or None.

    Returns:
        `tf.function`s with input signatures, by name.

    Raises:
        ValueError: The inputs of the model are not known, `text` is given with
            another model or does not fit it, or two mixtures have one name.
    """
    if isinstance(model, MoELanguageModel):
        if text is not None and len(text.vocabulary) != model.vocabulary_size:
            raise ValueError(
                "`text` must have the vocabulary of the model. Received: "
                f"{len(text.vocabulary)} tokens, vocabulary_size="
                f"{model.vocabulary_size}. Pass the one it was trained with."
            )
        return language_model_signatures(model, text)
    if text is not None:
        raise ValueError(
            "`text` is for a MoELanguageModel. Received: a "
            f"{type(model).__name__}. Leave `text` out."
        )
    if isinstance(model, MoETranslator):
        return translation_signatures(model)
    if not getattr(model, "inputs", None):
        raise ValueError(
            "`model` must know its inputs. Received: a subclassed model "
            f"{model.name!r}. Build it with `keras.Input` (functional or Sequential)."
        )
    signatures = {"serving_default": _outputs(model)}
    mixtures = [layer for layer in model._flatten_layers() if isinstance(layer, MoE)]
    if mixtures:
        names = [layer.name for layer in mixtures]
        if len(set(names)) < len(names):
            raise ValueError(
                "Mixtures of one model must have different names. Received: "
                f"{names}. Pass `name` to the layers."
            )
        signatures["routing"] = _routing(model, mixtures)
    return signatures


def _with_inputs_of(model, function, name):
    """A signature that gives a function the call argument of the model."""
    specs = [
        tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name)
        for tensor in model.inputs
    ]

    def call(*inputs):
        # A functional model takes its inputs as a flat list too.
        return function(inputs[0] if len(inputs) == 1 else list(inputs))

    return signature(specs, call, name)


def _outputs(model):
    def call(inputs):
        outputs = model(inputs, training=False)
        return outputs if isinstance(outputs, dict) else {"outputs": outputs}

    return _with_inputs_of(model, call, "serving_default")


def _routing(model, mixtures):
    def call(inputs):
        with recorded_routing(mixtures) as records:
            model(inputs, training=False)
        return routing_outputs(records)

    return _with_inputs_of(model, call, "routing")
