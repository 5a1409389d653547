import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, serving


def small_model():
    inputs = keras.Input((None, 4), name="features")
    outputs = layers.MoE(layers.FeedForwardExperts(4, 8), layers.NoisyTopKGating(k=2))(
        inputs
    )
    return keras.Model(inputs, outputs)


def test_a_functional_model_answers_as_in_keras_at_every_size(tmp_path):
    model = small_model()
    path = serving.export(model, tmp_path)
    loaded = tf.saved_model.load(str(path)).signatures["serving_default"]
    for shape in ((3, 5, 4), (1, 1, 4), (2, 0, 4)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        np.testing.assert_allclose(
            loaded(features=tf.constant(x))["outputs"], model(x), atol=1e-6
        )


def test_a_model_of_several_inputs(tmp_path):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    model = keras.Model([a, b], {"sum": a + b, "difference": a - b})
    loaded = tf.saved_model.load(str(serving.export(model, tmp_path)))
    outputs = loaded.signatures["serving_default"](a=tf.ones((2, 4)), b=tf.ones((2, 4)))
    assert set(outputs) == {"sum", "difference"}
    np.testing.assert_array_equal(outputs["sum"], np.full((2, 4), 2.0))


def test_every_weight_is_written_once(tmp_path):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(2048)])
    path = serving.export(model, tmp_path)
    size = sum(p.stat().st_size for p in (path / "variables").iterdir())
    assert size < 1.05 * 4 * model.count_params()


def test_versions_count_up_and_are_never_overwritten(tmp_path):
    model = small_model()
    assert serving.export(model, tmp_path).name == "1"
    assert serving.export(model, tmp_path, version=7).name == "7"
    assert serving.export(model, tmp_path).name == "8"
    with pytest.raises(ValueError, match="version=7"):
        serving.export(model, tmp_path, version=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "7", "8"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        serving.export(small_model(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="must be built"):
        serving.export(keras.Sequential([keras.layers.Dense(2)]), tmp_path)
    with pytest.raises(ValueError, match="version=0"):
        serving.export(small_model(), tmp_path, version=0)

    class Own(keras.Model):
        def build(self, shape):
            self.built = True

        def call(self, x):
            return x

    model = Own()
    model.build((None, 2))
    with pytest.raises(ValueError, match="must know its inputs"):
        serving.export(model, tmp_path)
