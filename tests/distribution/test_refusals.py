"""What does not yet run on several devices says so."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import engine, layers, optimizers
from keras_moe.distribution.mirrored.engine import MirroredEngine


class TwoReplicas(engine.Replicas):
    number = 2


class Two(engine.Engine):
    replicas = TwoReplicas()


def test_a_cell_in_another_recurrence_refuses_several(monkeypatch):
    monkeypatch.setattr(engine, "for_weights", Two)
    layer = keras.layers.RNN(layers.MoELSTMCell(3, 4))
    with pytest.raises(
        ValueError, match=r"`MoELSTMCell` runs on one device only.*2 replicas"
    ):
        layer.build((None, 5, 3))


def test_a_factor_over_sharded_experts_is_refused():
    variable = keras.Variable(np.zeros((4, 3)), name="bias")
    weights = MirroredEngine(tf.distribute.get_strategy()).weights
    with pytest.raises(
        ValueError, match=r"FactoredAdam .*\(3,\) for 'bias' .*\(4, 3\)"
    ):
        weights.add_slot(optimizers.FactoredAdam(), variable, (3,), "column")
