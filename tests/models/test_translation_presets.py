"""The paper's translation models: what the presets count is what is built."""

import dataclasses

import numpy as np
import pytest

from keras_moe import layers, models

NAMES = [name for name in models.preset_names() if name.startswith("mt_")]


def test_the_paper_counts_come_out_part_by_part():
    # 5 LSTMs of 4 * (512 + 512) * 2048 + 2048 * 512 = 9,437,184; the context's input to
    # one of them 4 * 512 * 2048 = 4,194,304; 2 mixtures of 4 * 2 * 512 * 2048 =
    # 8,388,608; softmax 512 * 32,768 = 16,777,216. Sum 84.9 million.
    counted = models.count(models.preset("mt_moe_32")).operations
    assert counted["lstm"] == 5 * 9_437_184 + 4_194_304
    assert counted["experts"] == 2 * 8_388_608
    assert counted["softmax"] == 16_777_216
    assert sum(n for part, n in counted.items() if part != "gating") == 84_934_656
    # Multilingual: 2 experts of hidden 8192 are 16,777,216 a mixture, 2 * 8,388,608
    # more in all: 101.7 million.
    many = models.count(models.preset("mt_moe_multilingual")).operations
    without_gating = sum(n for part, n in many.items() if part != "gating")
    assert without_gating == 84_934_656 + 2 * 8_388_608 == 101_711_872
    for name, billions in (("mt_moe_2048_h", "8.7"), ("mt_moe_multilingual", "8.7")):
        total = models.count(models.preset(name)).total_parameters
        assert f"{total / 1e9:.1f}" == billions


def test_dense_experts_of_a_translation_model_are_counted():
    dense = dataclasses.replace(
        models.preset("mt_moe_32"), middle="moe_1_wide", num_experts=0
    )
    counted, mixtures = models.count(dense), models.count(models.preset("mt_moe_32"))
    assert counted.operations["experts"] == mixtures.operations["experts"]
    # One of each side: 4 * 2 * 512 * 2048.
    assert counted.parameters["experts"] == 2 * 8_388_608
    assert counted.operations["gating"] == counted.parameters["gating"] == 0
    without = models.count(dataclasses.replace(dense, middle="none"))
    assert without.operations["experts"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_small_preset_has_the_counted_parameters(name):
    small = models.scale_down(
        models.preset(name), factor=64, vocabulary_size=50, max_experts=16
    )
    model = models.build_translation_model(small)
    model.build(None)
    counted = models.count(small, biases=True).total_parameters
    extra = 0
    for layer in model.moe_layers:
        gating = layer.gating
        if isinstance(gating, layers.HierarchicalGating):
            # The gates within the groups have noise, which the count leaves out with
            # the balanced gate, and that gate has thresholds.
            extra += int(np.prod(gating.noise_kernel.shape))
            gating = gating.primary_gating
        if isinstance(gating, layers.BalancedGating):
            extra += gating.num_experts
    assert model.count_params() == counted + extra
    ids = np.array([[4, 5, 2], [6, 2, 0]], "int32")
    assert model((ids, ids)).shape == (2, 3, 50)
    assert len(model.moe_layers) == small.num_mixtures
    copy = type(model).from_config(model.get_config())
    assert copy.get_config() == model.get_config()


@pytest.mark.parametrize("name", NAMES)
def test_every_translation_model_can_be_made_without_memory(name):
    model = models.build_translation_model(models.preset(name))
    assert not model.built
    assert model.dropout == 0.4
    assert model.lstm_units == 2048


def test_the_dense_baseline_has_equal_operations():
    options = {"units": 8, "hidden_units": 16, "num_experts": 12}
    [flat] = models.translation_middle("moe", k=(3,), **options)
    [dense] = models.translation_middle("moe_1_wide", k=(3,), name="dense", **options)
    assert (flat.experts.hidden_units, dense.experts.hidden_units) == (16, 3 * 16)
    assert dense.name == "dense"
    [wide] = models.translation_middle("moe_1_wide", k=(2, 2), num_groups=3, **options)
    assert wide.experts.hidden_units == 4 * 16
    assert models.translation_middle("none", **options) == []


def test_errors():
    with pytest.raises(ValueError, match="moe_256"):
        models.build_translation_model(models.preset("moe_256"))
    options = {"units": 8, "hidden_units": 16, "num_experts": 12}
    for message, changes in (
        ("kind='dense'", {"kind": "dense"}),
        ("gating='soft'", {"gating": "soft"}),
        (r"k=\(2, 2\), num_groups=None", {"k": (2, 2)}),
        (r"k=\(4,\), num_groups=3", {"num_groups": 3}),
    ):
        with pytest.raises(ValueError, match=message):
            models.translation_middle(**{"kind": "moe", **options, **changes})
