"""Mixtures with fewer experts: pruned, and merged."""

import functools
import warnings

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers, models
from tests.own_layers import HashGating

FEATURES = 6
X = np.random.default_rng(0).normal(size=(40, FEATURES)).astype("float32")


def mixture(num_experts=6, gating=None, name="moe", **kwargs):
    experts = layers.FeedForwardExperts(num_experts, 8, use_bias=True, **kwargs)
    gating = layers.TopKGating(2, use_bias=True) if gating is None else gating
    return layers.MoE(experts, gating, name=name)


def model_of(*mixtures):
    model = keras.Sequential([keras.Input((FEATURES,)), *mixtures])
    rng = np.random.default_rng(2)
    for weight in model.weights:
        if not weight.name.startswith("seed"):
            weight.assign(rng.normal(size=weight.shape))
    return model


def away_from(model, *experts):
    """Makes the gate of the one mixture leave some experts out."""
    bias = model.layers[0].gating.gate_bias
    bias.assign([-100.0 if e in experts else 0.0 for e in range(bias.shape[0])])
    return model


def test_experts_that_no_token_chose_are_not_missed():
    model = away_from(model_of(mixture()), 1, 4)
    pruned = keras_moe.prune_experts(model, [0, 2, 3, 5])
    assert pruned.layers[0].num_experts == 4
    np.testing.assert_array_equal(pruned(X), model(X))
    assert model.layers[0].num_experts == 6


def test_weights_are_those_of_the_kept_experts_in_the_order_asked_for():
    model = model_of(mixture(gating=layers.NoisyTopKGating(2, use_bias=True)))
    old = model.layers[0]
    new = keras_moe.prune_experts(old, (5, 0, 2))  # a mixture by itself
    pairs = zip(old.experts.stacked_weights, new.experts.stacked_weights, strict=True)
    for before, after in pairs:
        np.testing.assert_array_equal(after, np.array(before)[[5, 0, 2]])
    for name in ("gate_kernel", "gate_bias", "noise_kernel"):
        before, after = (np.array(getattr(m.gating, name)) for m in (old, new))
        np.testing.assert_array_equal(after, before[..., [5, 0, 2]])


def test_the_most_used_are_kept_by_counts_given_or_counted():
    model = away_from(model_of(mixture(), mixture(4, name="other")), 1, 4)
    model.compile(loss="mse")
    with pytest.raises(ValueError, match="`usage` must be given.*'moe'"):
        keras_moe.prune_experts(model, {"moe": 3})
    model.evaluate(X, X, verbose=0)
    pruned = keras_moe.prune_experts(model, {"moe": 4})
    np.testing.assert_array_equal(pruned(X), model(X))
    assert [layer.num_experts for layer in pruned.layers] == [4, 4]
    usage = {"moe": [3, 0, 0, 9, 0, 4]}
    pruned = keras_moe.prune_experts(model, 3, usage=usage, layers="moe")
    np.testing.assert_array_equal(
        pruned.layers[0].gating.gate_kernel,
        np.array(model.layers[0].gating.gate_kernel)[:, [0, 3, 5]],
    )


def test_fewer_experts_than_k_are_refused_unless_k_is_given():
    model = model_of(mixture())
    with pytest.raises(ValueError, match=r"k=2 of 'moe', 1 experts"):
        keras_moe.prune_experts(model, [3])
    alone = keras_moe.prune_experts(model, [3], k=1)
    assert alone.layers[0].gating.k == 1
    # The one expert that is left, whatever the gate says.
    x = X.astype("float64")
    first, second = (np.array(k)[3] for k in model.layers[0].experts.kernels)
    b1, b2 = (np.array(b)[3] for b in model.layers[0].experts.biases)
    wanted = np.maximum(x @ first + b1, 0) @ second + b2
    np.testing.assert_allclose(alone(X), wanted, rtol=1e-4, atol=1e-4)


def test_rules_options_shared_and_frozen_experts_stay():
    shared = keras.Sequential([keras.layers.Dense(FEATURES, name="shared")])
    experts = layers.GatedExperts(4, 8, frozen_experts=(1, 3), kernel_regularizer="l2")
    layer = layers.MoE(
        experts,
        layers.TopKGating(2),
        importance_loss_weight=0.02,
        activation="tanh",
        shared_experts=shared,
        name="gated",
    )
    model = model_of(mixture(), layer)
    pruned = keras_moe.prune_experts(model, {layer.name: [3, 0, 2]}).layers[1]
    assert pruned.experts.frozen_experts == (0,)
    assert pruned.importance_loss_weight == 0.02
    assert pruned.experts.kernel_regularizer is not None
    assert pruned.shared_experts is not shared
    np.testing.assert_array_equal(
        pruned.shared_experts.layers[0].kernel, shared.layers[0].kernel
    )
    # The shared experts' answer counts: without it this would differ.
    all_kept = keras_moe.prune_experts(model, {layer.name: range(4)})
    np.testing.assert_array_equal(all_kept(X), model(X))


def test_low_rank_additions_and_eight_bits_are_pruned_but_not_averaged():
    model = away_from(model_of(mixture()), 1, 4)
    experts = model.layers[0].experts
    experts.enable_lora(2)
    for b in experts.lora_kernels_b:
        b.assign(np.random.default_rng(3).normal(size=b.shape))
    experts.quantize("int8")
    pruned = keras_moe.prune_experts(model, [0, 2, 3, 5])
    assert pruned.layers[0].experts.kernels[0].dtype == "int8"
    np.testing.assert_array_equal(pruned(X), model(X))
    with pytest.raises(ValueError, match="lora_enabled=True, quantization_mode=int8"):
        keras_moe.merge_experts(model)


def test_lists_of_layers_are_pruned():
    experts = [keras.layers.Dense(FEATURES, "tanh", name=f"e{i}") for i in range(4)]
    layer = layers.MoE(
        layers.ExpertList(experts), layers.TopKGating(2, use_bias=True), name="moe"
    )
    model = away_from(model_of(layer), 2)
    pruned = keras_moe.prune_experts(model, [0, 1, 3])
    np.testing.assert_array_equal(pruned(X), model(X))
    assert not set(map(id, experts)) & set(map(id, pruned.layers[0].experts.experts))
    with pytest.raises(ValueError, match="a ExpertList in 'moe'"):
        keras_moe.merge_experts(model, [[0, 1], [2, 3]])


@pytest.mark.filterwarnings("ignore:.* with k=1")
def test_merging_all_takes_back_upcycling():
    dense = keras.Sequential(
        [
            keras.Input((None, FEATURES)),
            keras.layers.Dense(8, "gelu", use_bias=False),
            keras.layers.Dense(FEATURES, "tanh", kernel_regularizer=None),
        ]
    )
    for weight in dense.weights:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    sparse = keras_moe.upcycle(dense, num_experts=4, k=2)
    again = keras_moe.merge_experts(sparse)
    x = X.reshape(4, 10, FEATURES)
    np.testing.assert_allclose(again(x), dense(x), rtol=1e-6, atol=1e-6)
    (network,) = again.layers
    assert [type(layer) for layer in network.layers] == [keras.layers.Dense] * 2
    for new, old in zip(network.layers, dense.layers, strict=True):
        np.testing.assert_array_equal(new.kernel, old.kernel)
    # A mixture of one expert is the same.
    one = keras_moe.merge_experts(sparse, [[0, 1, 2, 3]], k=1)
    np.testing.assert_allclose(one(x), dense(x), rtol=1e-5, atol=1e-5)


def test_groups_are_averaged_by_usage_with_their_columns_of_the_gate():
    model = model_of(mixture(4))
    counts = [1.0, 3.0, 2.0, 0.0]
    merged = keras_moe.merge_experts(model, [[1, 0], [2, 3]], usage=counts)
    old, new = model.layers[0], merged.layers[0]
    pairs = zip(old.experts.stacked_weights, new.experts.stacked_weights, strict=True)
    for before, after in pairs:
        a, b, c, _ = np.array(before, np.float64)
        np.testing.assert_allclose(after, [(a + 3 * b) / 4, c], rtol=1e-6)
    kernel = np.array(old.gating.gate_kernel, np.float64).T
    wanted = np.array([(kernel[0] + 3 * kernel[1]) / 4, kernel[2]]).T
    np.testing.assert_allclose(new.gating.gate_kernel, wanted, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.* with k=1")
def test_experts_that_are_alike_merge_without_a_change():
    model = model_of(mixture(4))
    layer = model.layers[0]
    for weight in (*layer.experts.stacked_weights, layer.gating.gate_kernel):
        value = np.array(weight)
        twice = value[:, [0, 1, 0, 1]] if weight is layer.gating.gate_kernel else value
        weight.assign(twice if twice is not value else value[[0, 1, 0, 1]])
    layer.gating.gate_bias.assign([0.1, 0.3, 0.1, 0.3])
    # Two copies of the better expert are chosen; merged, one of them is.
    merged = keras_moe.merge_experts(model, [[0, 2], [1, 3]], k=1)
    np.testing.assert_allclose(merged(X), model(X), rtol=1e-5, atol=1e-5)


def test_models_of_a_class_and_their_files(tmp_path):
    model = models.MoELanguageModel(20, FEATURES, middle=mixture())
    tokens = np.random.default_rng(0).integers(1, 20, (3, 5))
    model(tokens)
    pruned = keras_moe.prune_experts(model, [0, 1, 2, 5])
    assert [layer.num_experts for layer in pruned.moe_layers] == [4]
    pruned.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(tokens), pruned(tokens))
    for each in (model, pruned):  # also what was made anew already
        dense = keras_moe.merge_experts(each)
        assert not dense.moe_layers
        assert dense(tokens).shape == (3, 5, 20)


@pytest.mark.filterwarnings("ignore:levels. with k=1")
def test_what_cannot_be_done_is_said():
    model = model_of(mixture(), mixture(name="other"))
    make = functools.partial(keras_moe.prune_experts, model)
    for wrong in ([0, 0, 1], [0, 6], [], [0.5, 1.0], [[0, 1]]):
        with pytest.raises(ValueError, match="`keep` must be"):
            make(wrong)
    with pytest.raises(ValueError, match=r"There are: 'moe', 'other'\."):
        make([0, 1], layers="nothing")
    with pytest.raises(ValueError, match=r"keys \['moe'\], without 'other'"):
        make({"moe": [0, 1]}, layers=["moe", "other"])
    with pytest.raises(ValueError, match=r"shape=\(3,\), num_experts=6"):
        make(2, usage=[1, 2, 3])
    with pytest.raises(ValueError, match="`groups` must hold every one of 6"):
        keras_moe.merge_experts(model, [[0, 1], [2, 3]])
    for wrong in (3, [0, 1, 2], [[0, 1], "23"]):
        with pytest.raises(ValueError, match="`groups` must be"):
            keras_moe.merge_experts(model, wrong)
    with pytest.raises(ValueError, match=r"shape=\(\), num_experts=6"):
        make(2, usage=["much"] * 6)
    with pytest.raises(ValueError, match=r"group \[2, 3\] of 'moe'"):
        keras_moe.merge_experts(
            model, [[0, 1], [2, 3], [4, 5]], usage=[1, 1, 0, 0, 1, 1]
        )
    gated = layers.MoE(layers.GatedExperts(4, 8), layers.TopKGating(2), name="gated")
    with pytest.raises(ValueError, match="a GatedExperts in 'gated'"):
        keras_moe.merge_experts(model_of(gated))
    two_levels = layers.HierarchicalMoE(
        layers.FeedForwardExperts(4, 8), 2, k=(1, 2), name="levels"
    )
    with pytest.raises(ValueError, match="'levels' with groups"):
        keras_moe.prune_experts(model_of(two_levels), [0, 1, 2])
    hashed = mixture(gating=HashGating(), name="hashed")
    with pytest.raises(ValueError, match="a HashGating in 'hashed'"):
        keras_moe.prune_experts(model_of(hashed), [0, 1])
    with pytest.raises(ValueError, match="`k` must be None for a gate without one"):
        keras_moe.prune_experts(
            model_of(mixture(gating=layers.SoftmaxGating())), [0, 1], k=1
        )
    with pytest.raises(ValueError, match="`model` must be a built"):
        keras_moe.prune_experts(mixture(), [0, 1])


def with_gate_inputs(**kwargs):
    inputs = keras.Input((FEATURES,))
    seen = keras.Input((3,))
    outputs = mixture(4, **kwargs)(inputs, gate_inputs=seen)
    model = keras.Model([inputs, seen], outputs)
    for weight in model.weights:
        weight.assign(np.random.default_rng(2).normal(size=weight.shape))
    return model


def test_gates_with_inputs_of_their_own(tmp_path):
    model = with_gate_inputs()
    x = [X, X[:, :3]]
    layer = model.get_layer("moe")
    layer.gating.gate_bias.assign([0.0, -100.0, 0.0, 0.0])
    pruned = keras_moe.prune_experts(model, [0, 2, 3])
    np.testing.assert_array_equal(pruned(x), model(x))
    pruned.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), pruned(x))
    kernel = np.array(layer.gating.gate_kernel, np.float64)
    merged = keras_moe.merge_experts(pruned, [[0, 1], [2]])  # once more
    wanted = np.stack([kernel[:, [0, 2]].mean(1), kernel[:, 3]], axis=1)
    gate = merged.get_layer("moe").gating
    np.testing.assert_allclose(gate.gate_kernel, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="with `gate_inputs`.*groups=None, 'moe'"):
        keras_moe.merge_experts(pruned)


def test_several_gates_over_the_same_experts_are_refused():
    tasks = layers.MultiGateMoE(layers.FeedForwardExperts(4, 8), 2, name="tasks")
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, tasks(mixture()(inputs)))
    for several in (model, tasks):
        with pytest.raises(ValueError, match="'tasks', a MultiGateMoE of 2 gates"):
            keras_moe.prune_experts(several, [0, 1])
    with pytest.raises(ValueError, match="'tasks', a MultiGateMoE of 2 gates"):
        keras_moe.merge_experts(model)
    pruned = keras_moe.prune_experts(model, range(6), layers="moe")
    for new, old in zip(pruned(X), model(X), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.filterwarnings("ignore:[ab]. with k=1")
def test_what_mixtures_share_they_share_afterwards(tmp_path):
    experts = layers.FeedForwardExperts(4, 8)
    beside = keras.layers.Dense(FEATURES)
    gate = layers.TopKGating(2)
    # Two with one gate, a third with a gate of its own.
    gates = {"a": gate, "b": gate, "c": layers.TopKGating(1, normalization="all")}
    mixtures = [
        layers.MoE(experts, gates[name], shared_experts=beside, name=name)
        for name in gates
    ]
    model = model_of(*mixtures)
    for pruned in (
        keras_moe.prune_experts(model, [3, 0]),
        keras_moe.merge_experts(model, [[3, 1], [0, 2]]),
    ):
        a, b, c = pruned.layers
        assert a.experts is b.experts is c.experts is not experts
        assert a.shared_experts is b.shared_experts is c.shared_experts is not beside
        assert a.gating is b.gating is not c.gating
        assert (c.gating.k, c.num_experts) == (1, 2)
        pruned.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(loaded(X), pruned(X))
        assert len(loaded.weights) == len(pruned.weights) == 6
    all_kept = keras_moe.prune_experts(model, range(4))
    np.testing.assert_array_equal(all_kept(X), model(X))
    with pytest.raises(ValueError, match="others for 'c' than for 'a'"):
        keras_moe.prune_experts(model, {"a": [0, 1], "b": [0, 1], "c": [1, 2]}, k=1)
    with pytest.raises(ValueError, match="Received: 'a' without 'b'"):
        keras_moe.prune_experts(model, {"a": [0, 1]})


@pytest.mark.filterwarnings("ignore:.* with k=")
def test_gates_whose_k_is_fixed_or_an_average():
    for fixed in (layers.GShardGating, layers.SwitchGating, layers.ExpertChoiceGating):
        model = model_of(mixture(gating=fixed()))
        with pytest.raises(ValueError, match=f"k=1, a {fixed.__name__} in 'moe'"):
            keras_moe.prune_experts(model, [0, 1, 2], k=1)
        pruned = keras_moe.prune_experts(model, [0, 1, 2])
        assert type(pruned.layers[0].gating) is fixed
    model = model_of(mixture(gating=layers.GShardGating()))
    with pytest.raises(ValueError, match=r"k=2 of 'moe', 1 experts.*Keep more\.$"):
        keras_moe.merge_experts(model, [range(6)])
    # Each of two experts takes all tokens: a token has 4 of 6, then 2 of 2.
    model = model_of(mixture(gating=layers.ExpertChoiceGating(4.0)))
    pruned = keras_moe.prune_experts(model, [5, 2])
    gates = pruned.layers[0].route(X)
    assert gates.expert_indices.shape == (2 * len(X),)
    with pytest.raises(ValueError, match=r"k=4 of 'moe', 3 experts"):
        keras_moe.prune_experts(model_of(mixture()), [0, 1, 2], k=4)
    grouped = layers.LossFreeGating(2, num_groups=3, num_kept_groups=2)
    model = model_of(mixture(gating=grouped))
    with pytest.raises(ValueError, match=r"gate of 'moe'.* 4 experts: `num_groups`"):
        keras_moe.prune_experts(model, [0, 1, 2, 4])
    assert keras_moe.prune_experts(model, [5, 4, 2]).layers[0].num_experts == 3


@pytest.mark.filterwarnings("ignore:dense.* with k=2")
def test_the_usage_of_a_mixture_is_not_that_of_its_upcycling():
    dense = keras.Sequential(
        [keras.layers.Dense(8, "relu"), keras.layers.Dense(FEATURES)]
    )
    dense(X)
    sparse = keras_moe.upcycle(dense, num_experts=4, k=2, inputs=X)
    with pytest.raises(ValueError, match="`usage` must be given.*'dense.*moe'"):
        keras_moe.prune_experts(sparse, 2)
    sparse(X)  # an eager call counts
    assert keras_moe.prune_experts(sparse, 2).layers[0].num_experts == 2


def test_nothing_that_is_deprecated_is_used():
    dense = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.Dense(FEATURES),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        sparse = keras_moe.upcycle(dense, num_experts=4, k=2)
        sparse(X)
        keras_moe.prune_experts(sparse, 3)
        keras_moe.merge_experts(sparse)


def test_a_block_of_a_transformer_becomes_dense_in_its_config_too(tmp_path):
    block = layers.MoETransformerBlock(2, mixture(4), causal=True, name="block")
    inputs = keras.Input((5, FEATURES))
    model = keras.Model(inputs, block(inputs))
    dense = keras_moe.merge_experts(model)
    dense.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = X.reshape(8, 5, FEATURES)
    np.testing.assert_array_equal(loaded(x), dense(x))
    assert dense.get_layer("block").moe is None
