"""Mixtures of published checkpoints, from files of their real layout."""

import json
import warnings
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_moe import conversion, layers
from keras_moe.conversion.tensor_files import TensorFiles
from tests.oracles import published as oracle

safetensors = pytest.importorskip("safetensors.numpy")

E, D, H = 4, 6, 10
X = np.random.default_rng(9).normal(size=(7, D)).astype("float32")


def mixtral_tensors(dtype="float32", blocks=(0, 1)):
    rng = np.random.default_rng(0)
    tensors = {"model.norm.weight": rng.normal(size=D)}
    for block in blocks:
        layer = f"model.layers.{block}.block_sparse_moe"
        tensors[f"{layer}.gate.weight"] = rng.normal(size=(E, D))
        for e in range(E):
            for name, shape in (("w1", (H, D)), ("w2", (D, H)), ("w3", (H, D))):
                tensors[f"{layer}.experts.{e}.{name}.weight"] = rng.normal(size=shape)
    return {name: value.astype(dtype) for name, value in tensors.items()}


def switch_tensors(dtype="float32", stacks=("encoder.block.1.layer.1",)):
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in stacks:
        tensors[f"{layer}.mlp.router.classifier.weight"] = rng.normal(size=(E, D))
        for e in range(E):
            expert = f"{layer}.mlp.experts.expert_{e}"
            tensors[f"{expert}.wi.weight"] = rng.normal(size=(H, D))
            tensors[f"{expert}.wo.weight"] = rng.normal(size=(D, H))
    return {name: value.astype(dtype) for name, value in tensors.items()}


def written(tensors, folder, shards=1):
    """A folder as it is published: one file, or several with an index."""
    if shards == 1:
        safetensors.save_file(tensors, folder / "model.safetensors")
        return folder
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        own = dict(list(tensors.items())[i::shards])
        safetensors.save_file(own, folder / file)
        places.update(dict.fromkeys(own, file))
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_mixtral_computes_what_the_published_block_does(tmp_path, dtype, shards):
    tensors = mixtral_tensors(dtype)
    path = written(tensors, tmp_path, shards)
    for block in (0, 1):
        layer = conversion.load_mixtral(path, block)
        wanted = oracle.mixtral_block(X, tensors, block)
        np.testing.assert_allclose(layer(X), wanted, rtol=1e-4, atol=1e-4)
    assert layer.num_experts == E
    assert layer.experts.hidden_units == H


def test_switch_computes_what_the_published_block_does(tmp_path):
    stacks = ("encoder.block.1.layer.1", "decoder.block.3.layer.2")
    tensors = switch_tensors(stacks=stacks)
    path = written(tensors, tmp_path) / "model.safetensors"
    for stack, block, layer in (("encoder", 1, stacks[0]), ("decoder", 3, stacks[1])):
        mixture = conversion.load_switch(path, block, stack=stack)
        wanted = oracle.switch_block(X, tensors, layer)
        np.testing.assert_allclose(mixture(X), wanted, rtol=1e-4, atol=1e-4)


def test_a_given_mixture_is_filled_and_keeps_its_type(tmp_path):
    tensors = mixtral_tensors(ml_dtypes.bfloat16)
    path = written(tensors, tmp_path)
    experts = layers.GatedExperts(E, H, dtype="bfloat16")
    mixture = layers.MoE(experts, layers.NoisyTopKGating(2), dtype="bfloat16")
    model = keras.Sequential([keras.Input((D,)), mixture])
    assert conversion.load_mixtral(path, 1, mixture) is mixture
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    kernel = mixture.experts.kernels[1]
    assert kernel.dtype == "bfloat16"
    np.testing.assert_array_equal(np.array(kernel)[3], tensors[name].T)
    prefixed = {f"language_model.{name}": value for name, value in tensors.items()}
    made = conversion.load_mixtral(
        written(prefixed, tmp_path), 1, dtype="bfloat16", prefix="language_model."
    )
    assert made.experts.kernels[0].dtype == made.compute_dtype == "bfloat16"
    assert made.gating.gate_kernel.dtype == "float32"
    np.testing.assert_array_equal(made(X), model(X))


def test_tensors_are_read_one_at_a_time(tmp_path, monkeypatch):
    path = written(mixtral_tensors(), tmp_path, shards=2)
    read, given, most = TensorFiles.read, [], 0

    def noted(self, name):
        nonlocal most
        most = max(most, sum(array() is not None for array in given))
        value = read(self, name)
        given.append(weakref.ref(value))
        return value

    monkeypatch.setattr(TensorFiles, "read", noted)
    conversion.load_mixtral(path, 0)
    assert len(given) == 3 * E + 1
    assert most <= 1  # when the next is read the one before may still be there


def test_a_missing_tensor_and_another_shape_are_named(tmp_path):
    tensors = mixtral_tensors(blocks=(0,))
    path = written(tensors, tmp_path)
    with pytest.raises(ValueError, match=r"'model\.layers\.7\.block.*gate\.weight'"):
        conversion.load_mixtral(path, 7)
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    right = tensors.pop(name)
    written(tensors, tmp_path)
    with pytest.raises(ValueError, match=r"experts\.2\.w2\.weight'.*13 others"):
        conversion.load_mixtral(path, 0)
    written({**tensors, name: right[:, :-1].copy()}, tmp_path)
    with pytest.raises(
        ValueError, match=r"experts\.2\.w2\.weight' of the shape \(6, 10\).*\(6, 9\)"
    ):
        conversion.load_mixtral(path, 0)


def test_a_mixture_that_cannot_be_filled_whole_is_left_alone(tmp_path):
    tensors = switch_tensors()
    del tensors["encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight"]
    mixture = layers.MoE(layers.FeedForwardExperts(E, H), layers.TopKGating(2))
    mixture(X)
    before = [np.array(weight) for weight in mixture.weights]
    with pytest.raises(ValueError, match=r"expert_3\.wo\.weight"):
        conversion.load_switch(written(tensors, tmp_path), 1, mixture)
    for weight, value in zip(mixture.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json"):
        conversion.load_mixtral(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="nothing"):
        conversion.load_mixtral(tmp_path / "nothing", 0)
    bad = tmp_path / "model.safetensors"
    bad.write_bytes(b"hello")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        conversion.load_mixtral(bad, 0)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(ValueError, match="`weight_map`"):
        conversion.load_mixtral(tmp_path, 0)
    index.write_text(
        json.dumps(
            {"weight_map": {"model.layers.0.block_sparse_moe.gate.weight": "lost"}}
        )
    )
    with pytest.raises(FileNotFoundError, match="lost"):
        conversion.load_mixtral(tmp_path, 0)


@pytest.mark.parametrize(
    ("experts", "wrong"),
    [
        (lambda: layers.GatedExperts(E + 1, H), f"num_experts={E + 1}"),
        (lambda: layers.GatedExperts(E, H, use_bias=True), "use_bias=True"),
        (lambda: layers.FeedForwardExperts(E, H), "experts=FeedForwardExperts"),
        (lambda: layers.GatedExperts(E, 3, output_units=2), "hidden_units=3, output"),
        (lambda: layers.GatedExperts(E, H, activation="gelu"), "activation=gelu"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(tmp_path, experts, wrong):
    path = written(mixtral_tensors(), tmp_path)
    mixture = layers.MoE(experts(), layers.TopKGating(2))
    with pytest.raises(ValueError, match=f"Received: {wrong}"):
        conversion.load_mixtral(path, 0, mixture)


def test_bad_arguments_are_refused(tmp_path):
    path = written(switch_tensors(), tmp_path)
    with pytest.raises(ValueError, match="`stack` must be one of"):
        conversion.load_switch(path, 1, stack="middle")
    with pytest.raises(ValueError, match="`block` must be"):
        conversion.load_switch(path, -1)
    with pytest.raises(ValueError, match="`mixture` must be a MoE"):
        conversion.load_switch(path, 1, keras.layers.Dense(3))
    with pytest.raises(ValueError, match="`path` must be a path.*path=None"):
        conversion.load_mixtral(None, 0)


@pytest.mark.filterwarnings("ignore:.* with k=1")
def test_a_mixture_of_another_kind_is_left_alone(tmp_path):
    path = written(mixtral_tensors(), tmp_path)
    experts = layers.GatedExperts(E, H)
    two_levels = layers.HierarchicalMoE(experts, 2, k=(1, 2))
    with pytest.raises(
        ValueError, match=r"shape \(6, 4\).*HierarchicalGating with \(2, 6, 2\)"
    ):
        conversion.load_mixtral(path, 0, two_levels)
    elsewhere = layers.MoE(layers.GatedExperts(E, H), layers.TopKGating(2))
    elsewhere(X, gate_inputs=X[:, :3])
    with pytest.raises(ValueError, match=r"a TopKGating with \(3, 4\)"):
        conversion.load_mixtral(path, 0, elsewhere)
    squashed = layers.MoE(experts, layers.TopKGating(2), activation="sigmoid")
    with pytest.raises(ValueError, match="Received: mixture's activation=sigmoid"):
        conversion.load_mixtral(path, 0, squashed)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    for mixture in (two_levels, elsewhere):
        kernel = np.array(mixture.experts.kernels[0])[0]
        assert np.abs(kernel - mixtral_tensors()[name].T).max() > 0.1


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        (lambda: layers.TopKGating(2, normalization="all"), "normalization='all'"),
        (lambda: layers.TopKGating(3), "TopKGating with k=3"),
        (lambda: layers.TopKGating(2, scaling_factor=2.5), "scaling_factor=2.5"),
        (layers.GShardGating, "a GShardGating"),
        (lambda: layers.LossFreeGating(2), "a LossFreeGating"),
        (layers.SoftmaxGating, "a SoftmaxGating"),
    ],
)
def test_a_gate_that_chooses_in_another_way_is_warned_of(tmp_path, gate, told):
    path = written(mixtral_tensors(blocks=(0,)), tmp_path)
    mixture = layers.MoE(layers.GatedExperts(E, H), gate())
    with pytest.warns(UserWarning, match=f"something else.*{told}") as warned:
        conversion.load_mixtral(path, 0, mixture)
    assert warned[0].filename == __file__


def test_noise_and_the_gate_of_switch_transformers_are_not_warned_of(tmp_path):
    (tmp_path / "switch").mkdir()
    switch = written(switch_tensors(), tmp_path / "switch")
    mixtral = written(mixtral_tensors(), tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*something else.*")
        experts = layers.FeedForwardExperts(E, H)
        own = layers.MoE(experts, layers.SwitchGating(), capacity_factor=1.25)
        conversion.load_switch(switch, 1, own)
        noisy = layers.MoE(layers.GatedExperts(E, H), layers.NoisyTopKGating(3))
        conversion.load_mixtral(mixtral, 0, noisy, k=3)
