"""The engines say which versions they need; one device takes those of the core."""

import sys

import keras
import pytest
import tensorflow as tf

from keras_moe import distribution, engine


class Several(tf.distribute.MirroredStrategy):
    """Two replicas, as far as the choice of an engine can tell."""

    num_replicas_in_sync = 2


@pytest.fixture(params=[(tf, "2.18.1"), (tf, "2.21.0"), (keras, "3.6.0")])
def version(request, monkeypatch):
    module, version = request.param
    monkeypatch.setattr(module, "__version__", version)
    return version


MESSAGE = r"needs TensorFlow 2\.20 and Keras 3\.15.*Received: .*{}.*pip install"


def test_replicas_with_other_versions(version):
    message = "`Several` " + MESSAGE.format(version)
    with Several(["CPU:0"]).scope(), pytest.raises(ValueError, match=message):
        engine.for_weights()


@pytest.mark.parametrize("name", distribution._HOMES)
def test_what_needs_an_engine_with_other_versions(version, name):
    with pytest.raises(ValueError, match=f"`{name}` " + MESSAGE.format(version)):
        getattr(distribution, name)


def test_one_replica_takes_every_version(version):
    for strategy in (
        tf.distribute.MirroredStrategy(["CPU:0"]),
        tf.distribute.OneDeviceStrategy("CPU:0"),
    ):
        with strategy.scope():
            assert engine.for_weights() is engine.ONE_DEVICE


def test_another_strategy_is_refused_with_every_version(version, monkeypatch):
    # Without a look at the engine, which may not be importable.
    monkeypatch.setitem(sys.modules, "keras_moe.distribution.mirrored.engine", None)
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0"])
    message = "`strategy` must be a MirroredStrategy.*CentralStorageStrategy"
    with strategy.scope(), pytest.raises(ValueError, match=message):
        engine.for_weights()
