"""Backbones of keras-hub: their transformer blocks hold the two layers as attributes."""

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe.layers.moe import mixtures_of

keras_hub = pytest.importorskip("keras_hub")

SIZES = {
    "vocabulary_size": 30,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "max_sequence_length": 6,
}


def inputs_of(model):
    rng = np.random.default_rng(0)
    given = {
        "token_ids": rng.integers(0, 30, (2, 6)),
        "segment_ids": np.zeros((2, 6), "int32"),
        "padding_mask": np.array([[1] * 6, [1] * 4 + [0] * 2]),
    }
    return {name: given[name] for name in model.input}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BertBackbone", "GPT2Backbone"])
def test_backbones_become_sparse_and_stay_of_their_class(name, tmp_path):
    dense = getattr(keras_hub.models, name)(**SIZES)
    rng = np.random.default_rng(1)
    for weight in dense.weights:
        weight.assign(rng.normal(size=weight.shape) / 2)
    sparse = keras_moe.upcycle(dense, num_experts=4, k=2)
    assert type(sparse) is type(dense)
    assert len(mixtures_of(sparse)) == 2
    inputs = inputs_of(dense)
    wanted, outputs = dense(inputs), sparse(inputs)
    for one, other in zip(*map(keras.tree.flatten, (wanted, outputs)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)
    # Their config says `Dense`: weights come back by upcycling again.
    for weight in sparse.trainable_weights:
        weight.assign(weight + 0.1)
    sparse.save_weights(tmp_path / "backbone.weights.h5")
    again = keras_moe.upcycle(dense, num_experts=4, k=2)
    again.load_weights(tmp_path / "backbone.weights.h5")
    wanted, outputs = sparse(inputs), again(inputs)
    for one, other in zip(*map(keras.tree.flatten, (wanted, outputs)), strict=True):
        np.testing.assert_array_equal(other, one)
    sparse.save(tmp_path / "backbone.keras")
    with pytest.raises(ValueError, match="objects could not be loaded|layer"):
        keras.saving.load_model(tmp_path / "backbone.keras")


@pytest.mark.slow
def test_gated_linear_units_are_said_to_be_no_pairs():
    sizes = {key: value for key, value in SIZES.items() if "max" not in key}
    sizes["num_query_heads"] = sizes["num_key_value_heads"] = sizes.pop("num_heads")
    model = keras_hub.models.LlamaBackbone(**sizes)
    with pytest.raises(
        ValueError, match=r"There are: none\. .*does not feed one Dense"
    ):
        keras_moe.upcycle(model, num_experts=4)
