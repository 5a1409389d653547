"""The signature `translate`: strings in, strings out."""

from typing import Any

import tensorflow as tf

from keras_moe.layers.routing_record import recorded_routing
from keras_moe.models.translation import MoETranslator
from keras_moe.serving.signature import routing_outputs, signature


def translation_signatures(
    model: MoETranslator,
    *,
    num_beams: int = 4,
    length_penalty: float = 0.2,
    max_length: int = 100,
) -> dict[str, Any]:
    """Functions to export a translation model with.

    Args:
        model: A built `MoETranslator`.
        num_beams: Int. Hypotheses of the beam search. Defaults to `4`.
        length_penalty: Float. See `keras_moe.models.beam_search`. Defaults to
            `0.2`.
        max_length: Int. Most subwords of a translation. Defaults to `100`.

    Returns:
        Dict of signature name to `tf.function`. `serving_default` takes `source`
        and `target_inputs`, token ids, and returns logits as `outputs`; `routing`,
        if there are mixtures, takes the same and returns experts and gates. With a
        vocabulary also `translate`, which takes `texts` `(batch,)` and
        `target_languages`, `(batch,)` or `(1,)` for all, both strings, and returns
        `translations` `(batch,)` and `scores` `(batch,)`.

    Raises:
        ImportError: tf-models-official is not installed.
        ValueError: A decoding option is out of range.
    """
    ids = [
        tf.TensorSpec([None, None], tf.int32, name)
        for name in ("source", "target_inputs")
    ]

    def logits(source, targets):
        return {"outputs": model((source, targets), training=False)}

    def routing(source, targets):
        with recorded_routing(model.moe_layers) as records:
            model((source, targets), training=False)
        return routing_outputs(records)

    def translate(texts, target_languages):
        translations, scores = model.translate_tensors(
            texts,
            tf.broadcast_to(target_languages, tf.shape(texts)),
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_length=max_length,
        )
        return {"translations": translations, "scores": scores}

    signatures = {"serving_default": signature(ids, logits, "serving_default")}
    if model.moe_layers:
        signatures["routing"] = signature(ids, routing, "routing")
    if model.vocabulary is not None:
        strings = [
            tf.TensorSpec([None], tf.string, name)
            for name in ("texts", "target_languages")
        ]
        signatures["translate"] = signature(strings, translate, "translate")
    return signatures
