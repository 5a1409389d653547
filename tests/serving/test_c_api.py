"""Exported models answer through TensorFlow's C++ loader, with no package installed.

The child process has no site-packages; `TF_LoadSessionFromSavedModel` is the loader that
TensorFlow Serving uses. The server binary itself is not tested.
"""

import keras
import numpy as np
import pytest

import keras_moe
from examples.serving.c_api_child import Child
from keras_moe import layers, models

FEATURES = 6


def gate(k=2):
    return layers.NoisyTopKGating(
        k=k, gate_initializer="glorot_normal", noise_initializer="glorot_normal"
    )


def mixtures():
    experts = layers.FeedForwardExperts
    return {
        "MoE": layers.MoE(experts(5, 8), gate()),
        "blocks": layers.MoE(experts(300, 4), gate()),
        "HierarchicalMoE": layers.HierarchicalMoE(
            experts(6, 8), 3, k=(2, 1), primary_gating=gate()
        ),
        "BalancedGating": layers.MoE(
            experts(4, 8),
            layers.BalancedGating(k=2, gate_initializer="glorot_normal"),
            load_loss_weight=0.0,
        ),
        "ExpertList": layers.MoE(
            layers.ExpertList(
                [keras.layers.Dense(FEATURES, a) for a in ("tanh", "relu", None)]
            ),
            gate(),
        ),
        "MoELSTM": layers.MoELSTM(FEATURES, 4, gate(), return_sequences=True),
        "MoELSTM, in segments": layers.MoELSTM(
            FEATURES, 4, gate(), return_sequences=True, segment_length=2
        ),
    }


FEW = ("MoE", "blocks", "HierarchicalMoE", "MoELSTM, in segments")
REST = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FEW else REST) for name in mixtures()],
)
def test_a_mixture_answers_as_in_keras_at_every_size(name, rng, tmp_path):
    inputs = keras.Input((None, FEATURES), name="x")
    model = keras.Model(inputs, keras.layers.Dense(3)(mixtures()[name](inputs)))
    path = keras_moe.serving.export(model, tmp_path)
    with Child(path) as child:
        for batch, time in (1, 1), (1, 7), (5, 1), (4, 3):
            x = rng.normal(size=(batch, time, FEATURES)).astype("float32")
            answer = child("serving_default", x=x)["outputs"]
            np.testing.assert_allclose(answer, model(x), atol=1e-5)
            # Whatever shares its batch: each row by itself.
            for row in range(batch):
                alone = child("serving_default", x=x[row : row + 1])["outputs"]
                np.testing.assert_allclose(alone[0], answer[row], atol=1e-6)


def test_a_language_model_scores_as_in_keras_whatever_the_padding(rng, tmp_path):
    middle = layers.MoE(layers.FeedForwardExperts(4, hidden_units=8), gate())
    model = models.MoELanguageModel(20, 8, middle=middle)
    model(np.ones((2, 3), "int32"))
    path = keras_moe.serving.export(model, tmp_path)
    with Child(path) as child:
        for batch, time in (1, 1), (3, 5):
            tokens = rng.integers(3, 20, (batch, time)).astype("int32")
            logits = child("serving_default", inputs=tokens)["outputs"]
            np.testing.assert_allclose(logits, model(tokens), atol=1e-5)
            score = child("score", inputs=tokens)
            # Two more steps of padding, and another sentence in the batch.
            padded = np.pad(tokens, [[0, 1], [0, 2]])
            padded[-1, 0] = 7
            again = child("score", inputs=padded)
            for key in "log_prob", "perplexity":
                np.testing.assert_allclose(
                    again[key][:batch], score[key], rtol=1e-5, atol=1e-6
                )
            np.testing.assert_allclose(
                again["token_log_probs"][:batch, :time],
                score["token_log_probs"],
                atol=1e-6,
            )


def test_wrong_requests_are_refused(tmp_path):
    inputs = keras.Input((None, FEATURES), name="x")
    model = keras.Model(inputs, mixtures()["MoE"](inputs))
    x = np.ones((1, 2, FEATURES), "float32")
    with Child(keras_moe.serving.export(model, tmp_path)) as child:
        for request in (
            {"signature": "nothing", "x": x},
            {"signature": "serving_default", "y": x},
            {"signature": "serving_default", "x": x.astype("float64")},
            {"signature": "serving_default", "x": x[0, 0]},
            {"signature": "serving_default", "x": x[..., :-1]},
        ):
            with pytest.raises(RuntimeError):
                child.ask(**request)
        assert child("serving_default", x=x)["outputs"].shape == x.shape  # still alive
