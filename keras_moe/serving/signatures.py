"""The functions that a model is exported with."""

from collections.abc import Callable

import keras

from keras_moe.layers.moe import mixtures_of
from keras_moe.layers.routing_record import recorded_routing
from keras_moe.models.translation import MoETranslator
from keras_moe.serving.language_model import LanguageModel, language_model_signatures
from keras_moe.serving.signature import routing_outputs, signature
from keras_moe.serving.structure import (
    CallArguments,
    call_arguments,
    named_outputs,
    unique_names,
)
from keras_moe.serving.text import TextCodec
from keras_moe.serving.translate import translation_signatures


def has_own_signatures(model: keras.Model) -> bool:
    """Whether a model has signatures of its own kind, whatever its inputs."""
    return isinstance(model, LanguageModel | MoETranslator)


def signatures_of(
    model: keras.Model,
    text: TextCodec | None,
    arguments: CallArguments | None = None,
) -> dict[str, Callable]:
    """Every signature that a model can have.

    Args:
        model: A built Keras model.
        text: `TextCodec` for a language model, or None.
        arguments: `CallArguments` of another model than a language or translation
            model. None takes what it was built with.

    Returns:
        `tf.function`s with input signatures, by name.

    Raises:
        ValueError: The inputs of the model are not known, or `text` is given with
            another model or does not fit it.
    """
    if isinstance(model, LanguageModel):
        if text is not None and len(text.vocabulary) != model.vocabulary_size:
            raise ValueError(
                "`text` must have the vocabulary of the model. Received: "
                f"{len(text.vocabulary)} tokens, vocabulary_size="
                f"{model.vocabulary_size}. Pass the one it was trained with."
            )
        return language_model_signatures(model, text)
    if text is not None:
        raise ValueError(
            "`text` is for a language model. Received: a "
            f"{type(model).__name__}. Leave `text` out."
        )
    if isinstance(model, MoETranslator):
        return translation_signatures(model)
    if arguments is None:
        arguments = call_arguments(model)
    signatures = {"serving_default": _outputs(model, arguments)}
    mixtures = mixtures_of(model)
    if mixtures:
        signatures["routing"] = _routing(model, arguments, mixtures)
    return signatures


def _outputs(model, arguments):
    def call(*inputs):
        return named_outputs(model, arguments.call(model, inputs))

    return signature(arguments.specs, call, "serving_default")


def _routing(model, arguments, mixtures):
    names = unique_names(layer.name for layer in mixtures)

    def call(*inputs):
        with recorded_routing(mixtures, names) as records:
            arguments.call(model, inputs)
        return routing_outputs(records)

    return signature(arguments.specs, call, "routing")
