"""What stands between LSTMs: the gates that have a name."""

import numpy as np
import pytest

from keras_moe import layers, models
from keras_moe.models.middle import GATINGS

KINDS = {
    "noisy_top_k": layers.NoisyTopKGating,
    "top_k": layers.TopKGating,
    "loss_free": layers.LossFreeGating,
    "switch": layers.SwitchGating,
    "balanced": layers.BalancedGating,
}


@pytest.mark.parametrize("gating", GATINGS)
def test_every_named_gate_makes_a_mixture_with_the_losses_it_needs(gating, rng):
    k = 1 if gating == "switch" else 2
    moe = models.make_mixture(8, 4, (k,), gating=gating, loss_weight=0.25)
    assert type(moe.gating) is KINDS[gating]
    x = rng.normal(size=(16, 6)).astype("float32")
    moe(x, training=True)
    # Importance and load, importance, none, that of Switch, importance and thresholds.
    expected = {"noisy_top_k": 2, "loss_free": 0, "balanced": len(moe.losses)}
    assert len(moe.losses) == expected.get(gating, 1)
    groups = models.make_mixture(
        8, 4, (1, 1), num_groups=2, gating=gating, loss_weight=0.25
    )
    assert np.all(np.isfinite(groups(x, training=True)))


def test_noise_reaches_both_levels():
    moe = models.make_mixture(8, 4, (1, 1), num_groups=2, noise=0.5)
    assert moe.gating.noise_stddev == 0.5
    assert moe.primary_gating is None or moe.primary_gating.noise_stddev == 0.5
    assert moe.gating.primary_gating.noise_stddev == 0.5
    with pytest.raises(ValueError, match="k=2"):
        models.make_mixture(8, 4, (2,), gating="switch")
