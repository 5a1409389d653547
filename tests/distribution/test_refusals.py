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


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: layers.MoELSTM(3, 4), "MoELSTM"),
        (lambda: layers.ExpertList([keras.layers.Dense(3)]), "ExpertList"),
    ],
)
def test_layers_of_one_device_refuse_several(make, name, monkeypatch):
    monkeypatch.setattr(engine, "for_weights", Two)
    layer = make()
    with pytest.raises(
        ValueError, match=f"`{name}` runs on one device only.*2 replicas"
    ):
        layer.build((None, 5, 3) if "LSTM" in name else (None, 3))


def test_capacity_is_refused_on_several_devices(monkeypatch):
    monkeypatch.setattr(engine, "for_weights", Two)
    layer = layers.MoE(layers.FeedForwardExperts(4, 3), capacity_factor=2.0)
    with pytest.raises(ValueError, match=r"capacity_factor=2.0 on 2 replicas"):
        layer.build(tf.TensorShape((None, 3)))


def test_hierarchical_mixture_of_other_experts_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "for_weights", Two)
    experts = layers.ExpertList([keras.layers.Dense(3) for _ in range(4)])
    layer = layers.HierarchicalMoE(experts, 2, k=(1, 1))
    with pytest.raises(ValueError, match=r"Received: ExpertList on 2 replicas"):
        layer.build((None, 3))


def test_a_factor_over_sharded_experts_is_refused():
    variable = keras.Variable(np.zeros((4, 3)), name="bias")
    weights = MirroredEngine(tf.distribute.get_strategy()).weights
    with pytest.raises(
        ValueError, match=r"FactoredAdam .*\(3,\) for 'bias' .*\(4, 3\)"
    ):
        weights.add_slot(optimizers.FactoredAdam(), variable, (3,), "column")
