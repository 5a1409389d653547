"""What does not yet run on several devices says so."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import engine, functional, layers, optimizers
from keras_moe.distribution.dtensor import training
from keras_moe.distribution.dtensor.dispatcher import MeshDispatcher
from keras_moe.distribution.mirrored.engine import MirroredEngine


@pytest.fixture
def in_step_of_mesh(monkeypatch):
    """Recurrences behave as in a step on a mesh."""
    for kind in (keras.layers.LSTM, keras.layers.GRU, keras.layers.RNN):
        monkeypatch.setattr(kind, "inner_loop", kind.inner_loop)  # put back afterwards
    training._install_recurrence()
    monkeypatch.setattr(training, "in_step", lambda: True)


@pytest.mark.usefixtures("in_step_of_mesh")
def test_a_recurrence_of_unknown_length_is_refused_on_a_mesh():
    layer = keras.layers.RNN(layers.MoELSTMCell(3, 4))
    layer.build((None, None, 3))
    with pytest.raises(
        ValueError,
        match=r"known number of time steps.*unrolled. Received: shape=\(2, None, 3\)",
    ):
        tf.function(layer).get_concrete_function(tf.TensorSpec((2, None, 3)))


@pytest.mark.usefixtures("in_step_of_mesh")
def test_stacked_cells_with_a_mixture_are_refused_on_a_mesh():
    layer = keras.layers.RNN([keras.layers.LSTMCell(3), layers.MoELSTMCell(3, 4)])
    layer.build((None, 2, 3))
    with pytest.raises(
        ValueError, match=r"must be one cell.*\['LSTMCell', 'MoELSTMCell'\].*one after"
    ):
        layer(np.ones((2, 2, 3), "float32"))


def test_assignments_of_open_length_are_refused_on_a_mesh():
    result = functional.make_gating_result(
        np.ones(3, "float32"), [0, 1, 1], 2, token_indices=np.array([0, 0, 1])
    )
    with pytest.raises(
        ValueError,
        match=r"depend on the data. Received: gates of shape \(3,\).*"
        "`functional.make_selection_result`",
    ):
        MeshDispatcher(mesh=None).mix(None, tf.zeros((2, 4)), result)


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
