"""Files that earlier versions wrote load, and give what they gave then."""

import tarfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.fixtures.saved_models import MODELS, make

FOLDER = Path(__file__).parent / "fixtures" / "saved_models"


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def saved(name, tmp_path):
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        # Python 3.11 has filters from 3.11.4 on.
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **safely)
    return tmp_path


def expected(saved):
    """Inputs, outputs, and the variables of the optimizer."""
    with np.load(saved / "expected.npz") as arrays:
        return list(arrays.values())


def assert_same(saved, model):
    inputs, outputs, *state = expected(saved)
    np.testing.assert_allclose(model(inputs), outputs, rtol=1e-5, atol=1e-6)
    assert len(state) == len(model.optimizer.variables) > 4
    for variable, value in zip(model.optimizer.variables, state, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


def test_checkpoint_with_its_optimizer(name, saved):
    model = make(name)
    model(expected(saved)[0])
    model.optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    checkpoint.read(str(saved / "checkpoint")).assert_consumed()
    assert_same(saved, model)


@pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15),
    reason="Keras 3.15 wrote options of its initializers that earlier ones do not know",
)
def test_keras_file(saved):
    assert_same(saved, keras.saving.load_model(saved / "model.keras"))


def test_weights_file(name, saved):
    model = make(name)
    inputs = expected(saved)[0]
    model(inputs)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(saved / "model.weights.h5")
    assert_same(saved, model)


def test_saved_model(saved):
    inputs, outputs, *_ = expected(saved)
    loaded = tf.saved_model.load(str(saved / "exported" / "1"))
    function = loaded.signatures["serving_default"]
    (key,) = function.structured_input_signature[1]
    (found,) = function(**{key: tf.constant(inputs)}).values()
    np.testing.assert_allclose(found, outputs, rtol=1e-5, atol=1e-6)
