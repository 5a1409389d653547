"""What stands between LSTMs: the gates that have a name."""

import dataclasses

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


def test_an_expert_that_every_token_passes_and_its_dense_twin(rng):
    moe = models.make_mixture(8, 4, (2,), shared_units=16, units=6, activation="linear")
    x = rng.normal(size=(16, 6)).astype("float32")
    moe(x)
    first, last = (np.asarray(w) for w in moe.shared_experts.weights)
    assert (first.shape, last.shape) == ((6, 16), (16, 6))
    # Without the chosen experts only what the shared one says is left.
    moe.experts.set_weights([np.zeros_like(w) for w in moe.experts.get_weights()])
    np.testing.assert_allclose(moe(x), np.maximum(x @ first, 0) @ last, atol=1e-5)
    [dense] = models.middle_layers(
        "moe_1_wide", units=6, hidden_units=8, k=2, shared_units=16
    )
    assert dense.experts.hidden_units == 2 * 8 + 16
    with pytest.raises(ValueError, match="`units`"):
        models.make_mixture(8, 4, (2,), shared_units=16)
    with pytest.raises(ValueError, match="shared_units=-1"):
        models.make_mixture(8, 4, (2,), shared_units=-1, units=6)


@pytest.mark.parametrize("middle", ["moe", "moe_1_wide", "moe_1_deep"])
def test_several_mixtures_one_after_the_other(middle):
    sizes = {"units": 6, "hidden_units": 8, "k": 2}
    layers = models.middle_layers(middle, num_mixtures=3, **sizes)
    assert [layer.name for layer in layers] == [middle, f"{middle}_2", f"{middle}_3"]
    [one] = models.middle_layers(middle, **sizes)
    for layer in layers:
        layer.build((None, 6))
    one.build((None, 6))
    assert all(layer.count_params() == one.count_params() for layer in layers)
    for kind, number in (("4xlstm", 2), ("none", 2), (middle, 0)):
        with pytest.raises(ValueError, match=f"`num_mixtures` .*num_mixtures={number}"):
            models.middle_layers(kind, num_mixtures=number, **sizes)


@pytest.mark.parametrize("middle", ["moe", "moe_1_wide", "moe_1_deep"])
def test_hidden_units_of_experts_are_dropped_in_training_alone(middle, rng):
    [layer] = models.middle_layers(
        middle,
        units=6,
        hidden_units=64,
        k=2,
        noise=0.0,
        shared_units=64,
        activation="linear",
        expert_dropout=0.5,
    )
    x = np.repeat(rng.normal(size=(1, 6)), 1000, axis=0).astype("float32")
    still = layer(x)
    np.testing.assert_array_equal(layer(x), still)
    drawn = np.asarray(layer(x, training=True))
    spread = drawn.std(axis=0)
    assert np.all(spread > 0)
    if middle != "moe_1_deep":  # what is dropped is made up for, on average
        error = 4 * spread / len(drawn) ** 0.5  # 4 standard errors
        assert np.all(np.abs(drawn.mean(axis=0) - still[0]) < error)
    with pytest.raises(ValueError, match="dropout=1.0"):
        models.make_mixture(8, 4, (2,), expert_dropout=1.0)


@pytest.mark.parametrize("middle", ["moe", "moe_1_wide", "moe_1_deep"])
def test_counts_with_an_expert_that_every_token_passes_are_those_of_the_model(middle):
    preset = models.Preset(
        "own",
        vocabulary_size=11,
        units=8,
        middle=middle,
        num_experts=4 if middle == "moe" else 0,
        k=(2,),
        hidden_units=8,
        shared_units=16,
        num_sampled=None,
    )
    model = models.build_language_model(preset)
    model.build((None, None))
    found = sum(
        int(np.prod(w.shape))
        for w in model.trainable_weights
        # The gate of one expert, which is constantly 1, is not counted.
        if "bias" not in w.path and (middle == "moe" or "gate" not in w.path)
    )
    assert found == sum(models.count(preset).parameters.values())
    without = models.count(dataclasses.replace(preset, shared_units=0))
    more = models.count(preset).core_operations - without.core_operations
    # Two layers more of 8 units in the deep one: as many as two kernels of 16.
    assert more == (2 * 8 * 16 if middle != "moe_1_deep" else 4 * 8 * 8)


@pytest.mark.parametrize("gating", GATINGS)
def test_a_factor_multiplies_what_the_chosen_experts_say(gating, rng):
    k = (1,) if gating == "switch" else (2,)
    x = rng.normal(size=(16, 6)).astype("float32")
    options = {"gating": gating, "activation": "linear"}
    if gating == "balanced":
        with pytest.raises(ValueError, match="scaling_factor=3.0"):
            models.make_mixture(8, 4, k, scaling_factor=3.0, **options)
        return
    for groups, levels in ((None, k), (2, (1, 1))):
        one, three = (
            models.make_mixture(
                8, 4, levels, num_groups=groups, scaling_factor=factor, **options
            )
            for factor in (1.0, 3.0)
        )
        one(x), three(x)
        three.set_weights(one.get_weights())
        np.testing.assert_allclose(three(x), 3 * one(x), rtol=1e-5, atol=1e-6)
