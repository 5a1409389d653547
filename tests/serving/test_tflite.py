"""Models convert to TensorFlow Lite with its built-in operations, and answer as in Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional, layers, serving
from tests.serving.test_c_api import FEATURES, gate, mixtures

if not hasattr(tf, "lite"):
    pytest.skip("this TensorFlow has no converter", allow_module_level=True)

# A loop over time is another matter.
NAMES = [name for name in mixtures() if not name.startswith("MoELSTM")]
MORE = {
    "capacity": lambda: layers.MoE(
        layers.FeedForwardExperts(5, 8), gate(), capacity_factor=1.0
    ),
    "SoftmaxGating": lambda: layers.MoE(
        layers.FeedForwardExperts(5, 8, use_bias=True),
        layers.SoftmaxGating(gate_initializer="glorot_normal"),
        load_loss_weight=0.0,
    ),
}


def runner_of(content):
    return tf.lite.Interpreter(model_content=content).get_signature_runner(
        "serving_default"
    )


# Each takes the converter seconds.
MARKS = {"MoE": (), "HierarchicalMoE": (), "blocks": (pytest.mark.slow,)}
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=MARKS.get(name, EXHAUSTIVE)) for name in (*NAMES, *MORE)],
)
def test_a_mixture_converts_with_any_batch(name, rng, tmp_path):
    inputs = keras.Input((FEATURES,), name="x")
    layer = MORE[name]() if name in MORE else mixtures()[name]
    model = keras.Model(inputs, keras.layers.Dense(3)(layer(inputs)))
    run = runner_of(serving.export_tflite(model, tmp_path / "m.tflite").read_bytes())
    for batch in 1, 4, 9:
        x = rng.normal(size=(batch, FEATURES)).astype("float32")
        np.testing.assert_allclose(run(x=x)["outputs"], model(x), atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["m.tflite"]


def test_sequences_and_the_converter_of_keras(rng, tmp_path):
    inputs = keras.Input((None, FEATURES), name="x")
    model = keras.Model(inputs, [mixtures()["MoE"](inputs), inputs])
    run = runner_of(serving.export_tflite(model, tmp_path / "m.tflite").read_bytes())
    x = rng.normal(size=(2, 3, FEATURES)).astype("float32")
    np.testing.assert_allclose(run(x=x)["moe"], model(x)[0], atol=1e-5)
    with serving.plain_operations():
        content = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    assert runner_of(content)


def test_what_does_not_convert_is_named(tmp_path):
    word = keras.Input((), dtype="string", name="word")
    model = keras.Model(word, keras.layers.Hashing(4)(word), name="of_words")
    with pytest.raises(ValueError, match="'of_words', which does not convert"):
        serving.export_tflite(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_capacity_is_the_same_in_plain_operations():
    for factor in 0.5, 0.75, 1.0, 1.25, 2.0:
        for tokens in *range(200), 4096, 99_999:
            sizes = (tokens, 12, 3, factor)
            wanted = int(functional.expert_capacity(*sizes))
            with serving.plain_operations():
                assert int(functional.expert_capacity(*sizes)) == wanted, sizes
