"""The signature `translate`: strings in, strings out."""

from typing import Any

import tensorflow as tf

from keras_moe.layers.routing import recorded_routing, routing_tensors
from keras_moe.models.translation import MoETranslator


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

    @tf.function(input_signature=ids, autograph=False)
    def serving_default(source, target_inputs):
        # The loader checks the type of what it is fed, but not the shape.
        source = tf.ensure_shape(source, [None, None])
        target_inputs = tf.ensure_shape(target_inputs, [None, None])
        return {"outputs": model((source, target_inputs), training=False)}

    @tf.function(input_signature=ids, autograph=False)
    def routing(source, target_inputs):
        source = tf.ensure_shape(source, [None, None])
        target_inputs = tf.ensure_shape(target_inputs, [None, None])
        with recorded_routing(model.moe_layers) as records:
            model((source, target_inputs), training=False)
        answer = {}
        for name, (record,) in records.items():
            answer[f"{name}_experts"], answer[f"{name}_gates"] = routing_tensors(record)
        return answer

    signatures = {"serving_default": serving_default}
    if model.moe_layers:
        signatures["routing"] = routing
    if model.vocabulary is None:
        return signatures

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, "texts"),
            tf.TensorSpec([None], tf.string, "target_languages"),
        ],
        autograph=False,
    )
    def translate(texts, target_languages):
        texts = tf.ensure_shape(texts, [None])
        target_languages = tf.ensure_shape(target_languages, [None])
        languages = tf.broadcast_to(target_languages, tf.shape(texts))
        translations, scores = model.translate_tensors(
            texts,
            languages,
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_length=max_length,
        )
        return {"translations": translations, "scores": scores}

    return {**signatures, "translate": translate}
