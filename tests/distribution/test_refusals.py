"""What does not yet run on several devices says so."""

import pytest
import tensorflow as tf

from keras_moe import layers, placement


class Two(placement.Placement):
    num_replicas = 2


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: layers.BalancedGating(k=1, num_experts=2), "BalancedGating"),
        (lambda: layers.MoELSTM(3, 4), "MoELSTM"),
        (
            lambda: layers.HierarchicalMoE(
                layers.FeedForwardExperts(4, 3), 2, k=(1, 1)
            ),
            "HierarchicalGating",
        ),
    ],
)
def test_layers_of_one_device_refuse_several(make, name, monkeypatch):
    monkeypatch.setattr(placement, "for_weights", Two)
    layer = make()
    with pytest.raises(
        ValueError, match=f"`{name}` runs on one device only.*2 replicas"
    ):
        layer.build((None, 5, 3) if "LSTM" in name else (None, 3))


def test_capacity_is_refused_on_several_devices(monkeypatch):
    monkeypatch.setattr(placement, "for_weights", Two)
    layer = layers.MoE(layers.FeedForwardExperts(4, 3), capacity_factor=2.0)
    with pytest.raises(ValueError, match=r"capacity_factor=2.0 on 2 replicas"):
        layer.build(tf.TensorShape((None, 3)))
