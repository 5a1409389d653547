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


class Mesh(engine.Engine):
    static_shapes = unrolls_loops = True


@pytest.mark.parametrize("untouched_rows", ["keep", "catch_up"])
def test_rows_of_their_own_are_refused_on_a_mesh(monkeypatch, untouched_rows):
    variable = keras.Variable(np.zeros((4, 3)), name="table")
    optimizer = optimizers.FactoredAdam(untouched_rows=untouched_rows)
    optimizer.build([variable])
    gradient = tf.IndexedSlices(tf.ones((1, 3)), tf.constant([2]), (4, 3))
    optimizer.apply([gradient], [variable])
    monkeypatch.setattr(engine, "current", Mesh)
    with pytest.raises(
        ValueError, match=f"`untouched_rows` must be 'decay' .* '{untouched_rows}'"
    ):
        optimizer.apply([gradient], [variable])


def test_a_factor_over_sharded_experts_is_refused():
    variable = keras.Variable(np.zeros((4, 3)), name="bias")
    weights = MirroredEngine(tf.distribute.get_strategy()).weights
    with pytest.raises(
        ValueError, match=r"FactoredAdam .*\(3,\) for 'bias' .*\(4, 3\)"
    ):
        weights.add_slot(optimizers.FactoredAdam(), variable, (3,), "column")
