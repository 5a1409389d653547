"""Dense models become sparse with the same outputs."""

import functools
import re

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers, models
from keras_moe.layers.moe import mixtures_of

FEATURES = 6


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


X = data(3, 5, FEATURES)


def randomized(model):
    """Also biases, which start as zeros."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape) / 2)
    return model


def pair(hidden=8, units=FEATURES, prefix="", **kwargs):
    first = keras.layers.Dense(hidden, "gelu", name=f"{prefix}up", **kwargs)
    return [first, keras.layers.Dense(units, name=f"{prefix}down", **kwargs)]


def sequential():
    return keras.Sequential([keras.Input((None, FEATURES)), *pair()], name="dense")


def with_layers_between():
    up, down = pair(use_bias=False)
    up.activation = keras.activations.linear
    down.activation = keras.activations.tanh
    between = [keras.layers.Activation("relu"), keras.layers.Dropout(0.0)]
    return keras.Sequential([keras.Input((None, FEATURES)), up, *between, down])


def bias_of_second_only():
    up = keras.layers.Dense(8, use_bias=False, name="up")
    between = keras.layers.ReLU()
    last = keras.layers.Dense(3, name="down")
    return keras.Sequential([keras.Input((None, FEATURES)), up, between, last])


def residual():
    up, down = pair()
    inputs = keras.Input((None, FEATURES), name="tokens")
    hidden = keras.layers.LayerNormalization()(inputs)
    outputs = keras.ops.tanh(inputs + down(up(hidden)))
    return keras.Model(inputs, outputs, name="residual")


def nested():
    """A model inside of a model, called twice, beside one of its layers' own."""
    inputs = keras.Input((None, FEATURES))
    block = keras.Sequential([*pair(prefix="inner_")], name="block")
    inner = residual()
    hidden = block(inner(block(inputs)))
    up, down = pair(prefix="outer_")
    return keras.Model(inputs, down(up(hidden)) + down(up(inputs)))


def several_inputs_and_outputs():
    up, down = pair()
    a = keras.Input((None, FEATURES), name="a")
    b = keras.Input((None, FEATURES), name="b")
    return keras.Model({"a": a, "b": b}, {"sum": down(up(a + b)), "b": b * 1.0})


@keras.saving.register_keras_serializable("upcycling")
class Block(keras.layers.Layer):
    """As transformer blocks are written: layers as attributes, made in `build`."""

    def __init__(self, hidden=8, **kwargs):
        super().__init__(**kwargs)
        self.hidden = hidden
        self.normalization = keras.layers.LayerNormalization()
        self.network = keras.Sequential(pair(prefix="network_"), name="network")
        self.several = {"pairs": [pair(prefix="pair_")]}

    def build(self, shape):
        self.up, self.down = pair(self.hidden)
        self.dropout = keras.layers.Dropout(0.25)
        for layer in (self.normalization, self.network, self.up):
            layer.build(shape)
        self.down.build((*shape[:-1], self.hidden))
        for up, down in self.several["pairs"]:
            up.build(shape)
            down.build((*shape[:-1], 8))

    def call(self, inputs, training=None):
        hidden = self.up(self.normalization(inputs))
        hidden = self.down(self.dropout(hidden, training=training))
        outputs = self.network(inputs + hidden)
        for up, down in self.several["pairs"]:
            outputs = outputs + down(up(outputs))
        return outputs

    def get_config(self):
        return {**super().get_config(), "hidden": self.hidden}


def composite():
    inputs = keras.Input((None, FEATURES))
    return keras.Model(inputs, Block(name="block")(inputs))


@keras.saving.register_keras_serializable("upcycling")
class Subclassed(keras.Model):
    def __init__(self, blocks=1, **kwargs):
        super().__init__(**kwargs)
        self.num_blocks = blocks
        self.blocks = [Block(name=f"block_{i}") for i in range(blocks)]
        self.up, self.down = pair()

    def call(self, inputs, training=None):
        for block in self.blocks:
            inputs = block(inputs, training=training)
        return self.down(self.up(inputs))

    def get_config(self):
        return {**super().get_config(), "blocks": self.num_blocks}


def subclassed():
    model = Subclassed()
    model(X)
    return model


CASES = {
    # How many mixtures each becomes.
    sequential: 1,
    with_layers_between: 1,
    bias_of_second_only: 1,
    residual: 1,
    nested: 3,
    composite: 3,
    subclassed: 4,
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_outputs_are_those_of_the_dense_model(make):
    dense = randomized(make())
    before = [np.array(weight) for weight in dense.weights]
    wanted = dense(X)
    inputs = X if make is subclassed else None
    sparse = keras_moe.upcycle(dense, num_experts=4, k=2, inputs=inputs)
    assert len(mixtures_of(sparse)) == CASES[make]
    assert type(sparse) is type(dense)
    assert sparse.name == dense.name
    np.testing.assert_allclose(sparse(X), wanted, rtol=1e-5, atol=1e-5)
    # The dense model stays, and weights are no one else's.
    for weight in sparse.weights:
        weight.assign(weight + 1)
    for weight, value in zip(dense.weights, before, strict=True):
        np.testing.assert_array_equal(weight, value)
    np.testing.assert_array_equal(dense(X), wanted)
    assert not mixtures_of(dense)
    assert not any("call" in vars(layer) for layer in dense._flatten_layers())


@pytest.mark.slow
def test_mixtures_inside_of_layers_of_a_class_learn():
    dense = composite()
    sparse = keras_moe.upcycle(dense, "block/up", num_experts=4, k=2)
    sparse.compile(keras.optimizers.Adam(1e-2), "mse")
    history = sparse.fit(X, np.zeros_like(X), epochs=5, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    (mixture,) = mixtures_of(sparse)
    assert "block_up_moe_load_cv" in history
    kernel = np.array(mixture.experts.kernels[0])
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3


def test_structures_of_inputs_and_outputs_and_names_are_kept():
    dense = randomized(several_inputs_and_outputs())
    dense.compile("adam", "mse")
    sparse = keras_moe.upcycle(dense, num_experts=3, k=2)
    given = {"a": X, "b": 2 * X}
    wanted, outputs = dense(given), sparse(given)
    assert outputs.keys() == {"sum", "b"}
    for name in outputs:
        np.testing.assert_allclose(outputs[name], wanted[name], rtol=1e-5, atol=1e-5)
    assert not sparse.compiled
    assert {layer.name for layer in sparse.layers} == {"a", "b", "up_moe"}


def test_shared_pairs_become_one_mixture_that_is_called_as_often():
    sparse = keras_moe.upcycle(nested(), num_experts=4, k=2)
    names = sorted({mixture.name for mixture in mixtures_of(sparse)})
    assert names == ["block_inner_up_moe", "outer_up_moe", "residual_up_moe"]
    with layers.routing_record.recorded_routing(mixtures_of(sparse)) as records:
        sparse(X)
    assert {name: len(calls) for name, calls in records.items()} == {
        "block_inner_up_moe": 2,
        "outer_up_moe": 2,
        "residual_up_moe": 1,
    }


def test_mixtures_that_are_there_already_stay():
    shared = keras.Sequential([keras.Input((FEATURES,)), *pair(prefix="shared_")])
    there = layers.MoE(
        layers.FeedForwardExperts(3, 8),
        layers.TopKGating(2),
        shared_experts=shared,
        name="there",
    )
    inputs = keras.Input((None, FEATURES))
    up, down = pair()
    dense = randomized(keras.Model(inputs, down(up(there(inputs)))))
    sparse = keras_moe.upcycle(dense, num_experts=4, k=2)
    assert [m.name for m in mixtures_of(sparse)] == ["there", "up_moe"]
    np.testing.assert_allclose(sparse(X), dense(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [sequential, nested])
def test_models_of_layers_alone_are_saved_and_loaded(make, tmp_path):
    dense = randomized(make())
    dense.save(tmp_path / "dense.keras")
    try:
        keras.saving.load_model(tmp_path / "dense.keras")
    except ValueError:  # Keras 3.6 mistakes its nodes
        pytest.skip("this Keras does not load the dense model either")
    sparse = keras_moe.upcycle(dense, num_experts=4, k=2)
    sparse.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(X), sparse(X))


def test_mixtures_in_layers_of_a_class_come_back_by_upcycling_again(tmp_path):
    dense = randomized(composite())
    # Keras 3.6 saves no layers of lists in dicts, dense or not.
    make = functools.partial(
        keras_moe.upcycle, dense, ["block/up", "network_up"], num_experts=4, k=2
    )
    sparse = make(noise=0.1, seed=0)
    sparse.save_weights(tmp_path / "model.weights.h5")
    again = make()
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again(X), sparse(X))
    sparse.save(tmp_path / "model.keras")  # their config says `Dense`
    with pytest.raises(ValueError, match="objects could not be loaded|layer"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.parametrize("within", [False, True])
def test_blocks_of_a_transformer_take_the_mixture_as_an_argument(within, tmp_path):
    block = functools.partial(
        layers.MoETransformerBlock, 2, causal=True, feed_forward=8, dropout=0.1
    )
    if within:
        blocks = [block(name="one"), block(name="two")]
        dense = models.MoETransformerLanguageModel(20, blocks, units=FEATURES)
        tokens = np.random.default_rng(0).integers(1, 20, (3, 5))
        inputs = keras.Input((None,), dtype="int32")
        dense(tokens)
    else:
        tokens, inputs = X, None
        source = keras.Input((None, 4), name="source")
        target = keras.Input((None, FEATURES), name="target")
        tokens = {"target": X, "source": X[..., :4]}
        made = block(name="one")
        dense = keras.Model({"target": target, "source": source}, made(target, source))
        made.attention.trainable = False
    randomized(dense)
    sparse = keras_moe.upcycle(dense, "one/hidden", num_experts=4, k=2, inputs=inputs)
    (moe,) = mixtures_of(sparse)
    assert moe.name == "one_hidden_moe"
    np.testing.assert_allclose(sparse(tokens), dense(tokens), rtol=1e-5, atol=1e-5)
    assert len(sparse.trainable_weights) == len(dense.trainable_weights) + 2
    sparse.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(tokens), sparse(tokens))
    # What was made anew is made anew again.
    pruned = keras_moe.prune_experts(sparse, [3, 0, 2])
    np.testing.assert_allclose(pruned(tokens), dense(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "gating",
    [
        lambda: layers.TopKGating(4),
        lambda: layers.NoisyTopKGating(2),  # zeros: all experts tie
        lambda: layers.TopKGating(2, use_bias=True),
        layers.SoftmaxGating,
    ],
)
def test_parts_of_a_copy_sum_to_it(gating):
    dense = randomized(sequential())
    sparse = keras_moe.upcycle(dense, num_experts=8, gating=gating, split=2)
    (mixture,) = mixtures_of(sparse)
    assert mixture.experts.hidden_units == 4
    np.testing.assert_allclose(sparse(X), dense(X), rtol=1e-5, atol=1e-5)
    indices = np.reshape(mixture.route(X).expert_indices, (15, -1, 2))
    np.testing.assert_array_equal(
        np.sort(indices)[..., 0] + 1, np.sort(indices)[..., 1]
    )
    # Parts differ, so they learn different things.
    kernel = np.array(mixture.experts.kernels[0])
    assert np.abs(kernel[0] - kernel[1]).min() > 0
    np.testing.assert_array_equal(kernel[0], kernel[2])


def test_parts_that_are_not_chosen_together_are_refused():
    dense = sequential()
    with pytest.raises(ValueError, match=r"`k` must be a multiple.*k=3, split=2"):
        keras_moe.upcycle(dense, num_experts=8, k=3, split=2)
    with pytest.raises(ValueError, match=r"num_experts=9, split=2"):
        keras_moe.upcycle(dense, num_experts=9, k=2, split=2)
    with pytest.raises(ValueError, match=r"split=3, 8 units of 'up'"):
        keras_moe.upcycle(dense, num_experts=9, k=3, split=3)
    all_of_them = lambda: layers.TopKGating(2, normalization="all")  # noqa: E731
    with pytest.raises(ValueError, match=r"split=2, a TopKGating"):
        keras_moe.upcycle(dense, num_experts=8, gating=all_of_them, split=2)


def test_gates_that_do_not_sum_to_one_are_warned_of():
    gating = lambda: layers.TopKGating(1, normalization="all")  # noqa: E731
    with pytest.warns(UserWarning, match="gates of TopKGating do not sum to 1"):
        keras_moe.upcycle(randomized(sequential()), num_experts=4, gating=gating)


def test_shared_experts_that_change_outputs_are_warned_of():
    shared = keras.layers.Dense(FEATURES)
    make = functools.partial(layers.MoE, shared_experts=shared)
    with pytest.warns(UserWarning, match="since its shared experts add to them"):
        keras_moe.upcycle(randomized(sequential()), num_experts=4, mixture=make)


def test_noise_is_relative_to_the_weights_and_seeded():
    dense = randomized(keras.Sequential([keras.Input((64,)), *pair(256, 64)]))
    kernels = []
    for seed in (1, 1, 2):
        sparse = keras_moe.upcycle(dense, num_experts=4, k=2, noise=0.1, seed=seed)
        kernels.append(np.array(sparse.layers[0].experts.kernels[1]))
    np.testing.assert_array_equal(kernels[0], kernels[1])
    kernel = np.array(dense.layers[1].kernel)
    added = kernels[0] - kernel
    # 65,536 draws: the deviation of their standard deviation is 0.3 %.
    np.testing.assert_allclose(added.std() / kernel.std(), 0.1, rtol=0.02)
    apart = np.corrcoef(added.reshape(4, -1))
    assert np.abs(apart - np.eye(4)).max() < 0.05
    assert np.abs(kernels[0] - kernels[2]).max() > 0


@pytest.mark.slow
def test_layers_are_named_alone_or_with_those_around_or_picked_by_a_function():
    dense = nested()
    make = functools.partial(keras_moe.upcycle, dense, num_experts=4, k=2)

    def names(sparse):
        return sorted({mixture.name for mixture in mixtures_of(sparse)})

    assert names(make("outer_up")) == ["outer_up_moe"]
    assert names(make(["block/inner_up", "residual/up"])) == [
        "block_inner_up_moe",
        "residual_up_moe",
    ]
    assert names(make(lambda layer: "inner" in layer.name)) == ["block_inner_up_moe"]


def test_a_name_that_stands_for_no_pair_is_refused_with_those_there_are():
    up, down = pair()
    inputs = keras.Input((FEATURES,))
    hidden = up(inputs)
    elsewhere = keras.layers.Dense(3, name="elsewhere")(hidden)
    ok = keras.layers.Dense(4, name="ok")(down(hidden))
    last = keras.layers.Dense(3, name="last")(ok)
    model = keras.Model(inputs, [last, elsewhere])
    make = functools.partial(keras_moe.upcycle, model, num_experts=4, k=2)
    with pytest.raises(ValueError, match=r"'nothing'\. There are: 'down', 'ok'\."):
        make("nothing")
    with pytest.raises(ValueError, match="'up', does not feed one Dense layer alone"):
        make("up")
    with pytest.raises(ValueError, match=r"\['ok'\] overlap"):
        make(["down", "ok"])
    # None takes the first of two that overlap.
    assert [m.name for m in mixtures_of(make())] == ["down_moe"]
    with pytest.raises(ValueError, match="There are: none"):
        keras_moe.upcycle(
            keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), num_experts=2
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernel_regularizer": "l2"}, "another kernel_regularizer than 'down'"),
        ({"activity_regularizer": "l2"}, "an activity regularizer in 'up'"),
        ({"dtype": "bfloat16"}, "another dtype policy than 'down'"),
    ],
)
def test_what_experts_cannot_take_over_is_said(change, reason):
    dtype = "mixed_bfloat16" if "dtype" in change else None
    up = keras.layers.Dense(8, name="up", **change)
    down = keras.layers.Dense(4, name="down", dtype=dtype)
    model = keras.Sequential([keras.Input((4,)), up, down])
    with pytest.raises(ValueError, match=f"'up' has {re.escape(reason)}"):
        keras_moe.upcycle(model, num_experts=4, k=2)


def test_rules_types_freezing_and_options_of_the_mixture_are_taken_over():
    rules = {
        "kernel_regularizer": keras.regularizers.L2(0.5),
        "bias_constraint": "non_neg",
    }
    made = pair(dtype="mixed_bfloat16", **rules)
    model = keras.Sequential([keras.Input((FEATURES,)), *made])
    model.trainable = False
    mixture = functools.partial(
        layers.MoE, importance_loss_weight=0.01, capacity_factor=2.0
    )
    sparse = keras_moe.upcycle(model, num_experts=4, k=2, mixture=mixture)
    (layer,) = mixtures_of(sparse)
    assert layer.compute_dtype == layer.experts.compute_dtype == "bfloat16"
    assert layer.experts.kernel_regularizer.l2 == 0.5
    assert layer.experts.bias_constraint is not None
    assert (layer.importance_loss_weight, layer.capacity_factor) == (0.01, 2.0)
    assert not layer.experts.trainable


def test_dropout_between_becomes_that_of_hidden_units():
    up, down = pair()
    dropouts = [keras.layers.Dropout(0.5, seed=i) for i in range(2)]
    model = keras.Sequential([keras.Input((FEATURES,)), up, *dropouts, down])
    sparse = keras_moe.upcycle(model, num_experts=4, k=2)
    (mixture,) = mixtures_of(sparse)
    assert mixture.experts.dropout == 0.75
    x = np.repeat(X[0, :1], 50, axis=0)
    assert np.std(sparse(x, training=True), axis=0).min() > 0.01
    np.testing.assert_allclose(sparse(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "between",
    [
        lambda: keras.layers.Dropout(0.5, noise_shape=(None, 1)),
        lambda: keras.layers.GaussianNoise(0.1),
        lambda: keras.layers.ReLU(max_value=6.0),
        lambda: keras.layers.LayerNormalization(),
    ],
)
def test_layers_between_that_experts_do_not_have_make_no_pair(between):
    up, down = pair()
    model = keras.Sequential([keras.Input((FEATURES,)), up, between(), down])
    with pytest.raises(ValueError, match="'up' does not feed one Dense layer alone"):
        keras_moe.upcycle(model, num_experts=4, k=2)


@keras.saving.register_keras_serializable("upcycling")
class Cached(keras.layers.Layer):
    """Calls its layers by other ways than the attributes that hold them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.up, self.down = pair()
        self.run = lambda x, up=self.up, down=self.down: down(up(x))

    def build(self, shape):
        self.up.build(shape)
        self.down.build((*shape[:-1], 8))

    def call(self, inputs):
        return self.run(inputs)


def test_a_pair_that_cannot_be_reached_is_refused():
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, Cached(name="cached")(inputs))
    with pytest.raises(ValueError, match=r"'cached/up', called 1 times.*0 times"):
        keras_moe.upcycle(model, num_experts=4, k=2)


def test_models_that_are_not_built_or_have_no_config_are_refused():
    with pytest.raises(ValueError, match="`model` must be a built"):
        keras_moe.upcycle(keras.Sequential(pair()), num_experts=4)

    class NoConfig(Block):
        def __init__(self, wanted, **kwargs):
            super().__init__(**kwargs)

    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, NoConfig(object(), name="own")(inputs))
    with pytest.raises(ValueError, match="'own', a NoConfig"):
        keras_moe.upcycle(model, "pair_up", num_experts=4)
    with pytest.raises(ValueError, match="`gating` must be a function"):
        keras_moe.upcycle(sequential(), num_experts=4, gating=layers.NoisyTopKGating(2))
    with pytest.raises(ValueError, match=r"Received: k=3, a TopKGating with k=2"):
        keras_moe.upcycle(
            sequential(), num_experts=4, k=3, gating=lambda: layers.TopKGating(2)
        )
    with pytest.raises(ValueError, match=r"`mixture` must make.*mixture='moe'"):
        keras_moe.upcycle(sequential(), num_experts=4, mixture="moe")
    with pytest.raises(ValueError, match=r"`mixture` must return.*returned None"):
        keras_moe.upcycle(sequential(), num_experts=4, mixture=lambda *_, **__: None)
    with pytest.raises(ValueError, match="`inputs` must be specs.*Received: 5"):
        keras_moe.upcycle(sequential(), num_experts=4, inputs=5)
    with pytest.raises(ValueError, match=r"`seed` must be.*seed=1\.5"):
        keras_moe.upcycle(sequential(), num_experts=4, seed=1.5)
    with pytest.raises(ValueError, match="`layers` must name.*Received: 5"):
        keras_moe.upcycle(sequential(), 5, num_experts=4)
    with pytest.raises(ValueError, match="`layers` must be a list of str"):
        keras_moe.upcycle(sequential(), ["up", 5], num_experts=4)
    with pytest.raises(ValueError, match="`inputs` must be given"):
        keras_moe.upcycle(subclassed(), num_experts=4)
