"""Exports models under MirroredStrategy, loads them, compares with Keras."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_moe
from keras_moe.serving.signatures import signatures_of
from tests.distribution import child


def language_model():
    model = keras_moe.models.MoELanguageModel(
        child.VOCABULARY,
        8,
        middle=child.mixture(child.Case()),
        stateful=True,
    )
    model.build((6, 4))
    return model


def adapted_apart(strategy, directory):
    """How far a model of strings is from its export, after `adapt` in the scope."""
    with strategy.scope():
        words = keras.layers.TextVectorization(output_mode="tf_idf")
        words.adapt(["a b c", "c d e"])
        norm = keras.layers.Normalization()
        norm.adapt(np.arange(12.0).reshape(3, 4))
        text, x = (
            keras.Input((), dtype="string", name="text"),
            keras.Input((4,), name="x"),
        )
        rows = keras.layers.Dense(8)(keras.layers.Concatenate()([words(text), norm(x)]))
        rows = child.mixture(child.Case())(rows)
        model = keras.Model({"text": text, "x": x}, rows)
    given = {"text": tf.constant(["a b", "e z"]), "x": tf.ones((2, 4))}
    path = keras_moe.serving.export(model, directory)
    found = tf.saved_model.load(str(path)).signatures["serving_default"](**given)
    return float(np.max(np.abs(found["outputs"] - model(given))))


def answer(signature, tokens):
    (argument,) = signature.structured_input_signature[1]
    return signature(**{argument: tf.constant(tokens)})


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    strategy = child.strategy_of(settings["devices"])
    results = {}
    for name in settings["models"]:
        if name == "adapted":
            apart = adapted_apart(strategy, Path(settings["directory"]) / name)
            results[name] = {"apart": apart}
            continue
        if name == "language_model":
            keras.utils.clear_session()
            with strategy.scope():
                model = language_model()
        else:
            model = child.build(child.Case(layer=name), strategy)
            child.train(model, child.Case(layer=name), 3)
        # Inside of the scope too, where users may well call it.
        with strategy.scope():
            path = keras_moe.serving.export(model, Path(settings["directory"]) / name)
        loaded = tf.saved_model.load(str(path)).signatures
        tokens = np.random.default_rng(1).integers(1, child.VOCABULARY, (5, 6))
        tokens = tokens.astype("int32")
        found = answer(loaded["serving_default"], tokens)["outputs"].numpy()
        if name == "language_model":
            state = model.initial_state(len(tokens))
            expected = model.call_with_state(tokens, state)[0].numpy()
        else:
            expected = model.predict(tokens, verbose=0)
        # As the sharded model itself says.
        again = signatures_of(model, None)["routing"](tf.constant(tokens))
        routed = answer(loaded["routing"], tokens)
        results[name] = {
            "apart": float(np.max(np.abs(found - expected))),
            "largest": float(np.max(np.abs(found))),
            "bytes": sum(p.stat().st_size for p in (path / "variables").iterdir()),
            "expected_bytes": 4 * sum(v.numpy().size for v in model.variables),
            "routing_apart": max(
                float(np.max(np.abs(routed[k].numpy() - again[k].numpy())))
                for k in again
            ),
        }
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
