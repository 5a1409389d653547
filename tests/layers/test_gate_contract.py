"""What mixtures ask of their gates, and what they say where it is not met."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional as F
from keras_moe import layers, serving
from keras_moe.types import CountedStatistics, GateStatistics

D = 8
NO_LOSSES = {"importance_loss_weight": 0.0, "load_loss_weight": 0.0}


def experts(n=4):
    return layers.FeedForwardExperts(n, D)


def hierarchical(k, **options):
    return layers.HierarchicalMoE(experts(8), 2, k=k, **NO_LOSSES, **options)


def noisy(k=1, **options):
    return layers.NoisyTopKGating(k, gate_initializer="glorot_normal", **options)


def recurrent(gate):
    return layers.MoELSTM(D, 4, gate, **NO_LOSSES)


def in_cell(gate):
    return keras.layers.RNN(layers.MoELSTMCell(D, 4, gate))


def gate_gradients(layer, rng):
    """Largest gradient of the task at each gate kernel, in the order of the layer."""
    shape = (16, 3, D) if isinstance(layer, keras.layers.RNN) else (16, D)
    x = rng.normal(size=shape).astype("float32")
    layer(x)
    kernels = [v for v in layer.trainable_variables if v.name == "gate_kernel"]
    for kernel in kernels:
        kernel.assign(rng.normal(size=kernel.shape))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(tf.sin(layer(x, training=True)))
    gradients = tape.gradient(total, [v.value for v in kernels])
    return [float(tf.reduce_max(tf.abs(g))) for g in gradients]


# Gates that the task cannot teach.


@pytest.mark.parametrize(
    ("make", "warned"),
    [
        (lambda: layers.MoE(experts(), noisy(), **NO_LOSSES), ["num_experts=4"]),
        (lambda: hierarchical((1, 1)), ["num_groups=2", "group size=4"]),
        (lambda: hierarchical((1, 2)), ["num_groups=2"]),
        (lambda: hierarchical((2, 1)), ["group size=4"]),
        (
            lambda: hierarchical((1, 2), primary_gating=layers.TopKGating(1)),
            ["num_groups=2"],
        ),
        (lambda: recurrent(noisy()), ["num_experts=4"]),
        (lambda: in_cell(noisy()), ["num_experts=4"]),
    ],
)
def test_every_gate_that_the_task_cannot_teach_is_named(make, warned):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        make()
    messages = [str(w.message) for w in seen]
    assert len(messages) == len(warned)
    for message, of in zip(messages, warned, strict=True):
        assert f"k=1 of {of}" in message
        assert 'normalization="all"' in message


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.MoE(experts(), noisy(normalization="all"), **NO_LOSSES),
        lambda: hierarchical((1, 1), normalization="all"),
        lambda: hierarchical((1, 2), normalization=("all", "selected")),
        lambda: hierarchical((2, 1), normalization=("selected", "all")),
        lambda: hierarchical(
            (1, 1),
            primary_gating=noisy(normalization="all"),
            normalization=["selected", "all"],
        ),
        lambda: recurrent(noisy(normalization="all")),
        lambda: in_cell(noisy(normalization="all")),
        lambda: layers.MoE(experts(1), noisy(), **NO_LOSSES),  # nothing to choose
        lambda: layers.HierarchicalMoE(experts(), 4, k=(2, 1), **NO_LOSSES),
    ],
)
def test_the_remedy_gives_every_level_a_gradient_without_a_warning(make, rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = make()
    if layer.trainable and getattr(layer, "num_experts", 4) > 1:
        gradients = gate_gradients(layer, rng)
        groups_of_one = getattr(layer, "num_groups", 0) == 4
        assert min(gradients[1:] if groups_of_one else gradients) > 1e-5


@pytest.mark.parametrize("normalization", ["all", ("selected", "all")])
def test_normalization_of_both_levels_is_kept(normalization):
    layer = hierarchical((2, 2), normalization=normalization, use_gate_bias=True)
    again = layers.HierarchicalMoE.from_config(layer.get_config())
    gating = again.gating
    assert gating.secondary_normalization == "all"
    first = normalization if isinstance(normalization, str) else normalization[0]
    assert gating.primary_gating.normalization == first
    assert gating.use_bias
    assert gating.primary_gating.use_bias
    # A file of before has none of these keys.
    config = layer.get_config()
    del config["normalization"], config["use_gate_bias"]
    old = layers.HierarchicalMoE.from_config(config).gating
    assert (old.secondary_normalization, old.use_bias) == ("selected", False)


def test_a_bad_normalization_of_two_levels_is_refused():
    with pytest.raises(ValueError, match=r"normalization=\('all',\)"):
        hierarchical((2, 2), normalization=("all",))
    with pytest.raises(ValueError, match="normalization='softmax'"):
        hierarchical((2, 2), normalization=("all", "softmax"))


# Only a smooth load makes a load loss.


@keras.saving.register_keras_serializable(package="tests")
class OwnGate(keras.layers.Layer):
    """A gate of a user's that says nothing about its load."""

    num_experts = None

    def __init__(self, smooth=False, **kwargs):
        super().__init__(**kwargs)
        self.smooth = smooth

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.num_experts))

    def call(self, inputs, mask=None, training=None):
        probabilities = tf.nn.softmax(inputs @ self.kernel)
        gates, chosen = tf.math.top_k(probabilities, 2)
        load = tf.reduce_sum(probabilities, axis=0) if self.smooth else None
        return F.make_gating_result(
            gates, chosen, self.num_experts, load=load, mask=mask
        )

    def get_config(self):
        return {**super().get_config(), "smooth": self.smooth}


GATES = {
    "noisy": (lambda: noisy(2), True),
    "noisy, all experts": (lambda: noisy(4), False),
    "top-k": (lambda: layers.TopKGating(k=2), False),
    "softmax": (lambda: layers.SoftmaxGating(gate_initializer="normal"), False),
    "balanced": (lambda: layers.BalancedGating(k=2), False),
    "own, counted": (lambda: OwnGate(), False),
    "own, smooth": (lambda: OwnGate(smooth=True), True),
    # Not "selected": of one gate it is constant, and its importance as well.
    "hierarchical": (
        lambda: layers.HierarchicalGating(2, (1, 1), normalization="all"),
        True,
    ),
    "hierarchical, whole groups": (
        lambda: layers.HierarchicalGating(2, (1, 2), gate_initializer="normal"),
        True,
    ),
    "hierarchical, counted": (
        lambda: layers.HierarchicalGating(
            2, (1, 2), primary_gating=layers.TopKGating(1), gate_initializer="normal"
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("seen_from", ["built", "reloaded"])
@pytest.mark.filterwarnings("ignore:.*k=")
def test_by_default_every_balancing_loss_has_a_gradient(name, seen_from, rng):
    make, smooth = GATES[name]
    layer = layers.MoE(experts(), make())
    if seen_from == "reloaded":
        layer = layers.MoE.from_config(layer.get_config())
    x = rng.normal(size=(12, D)).astype("float32")
    layer(x)
    variables = [v.value for v in layer.gating.trainable_variables]
    with tf.GradientTape(persistent=True) as tape:
        layer(x, training=True)
        losses = layer.losses
    own = len(layer.gating(x, training=True).auxiliary_losses)
    assert len(losses) == 1 + smooth + own
    for loss in losses:
        gradients = tape.gradient(loss, variables)
        assert any(g is not None and np.abs(g).max() > 0 for g in gradients)


def test_by_default_a_recurrent_mixture_has_a_load_loss_of_a_smooth_load_only():
    x = np.ones((2, 3, 4), "float32")
    for gate, expected in ((noisy(2), 2), (layers.TopKGating(k=2), 1)):
        layer = layers.MoELSTM(D, 4, gate)
        layer(x, training=True)
        assert len(layer.losses) == expected
        again = layers.MoELSTM.from_config(layer.get_config())
        again(x, training=True)
        assert len(again.losses) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda gate, **o: layers.MoE(experts(), gate, **o),
        lambda gate, **o: layers.MoELSTM(D, 4, gate, **o),
    ],
)
def test_a_load_loss_that_was_asked_for_is_added_with_a_warning(make):
    with pytest.warns(UserWarning, match=r"TopKGating.*load_loss_weight=0\.3"):
        layer = make(layers.TopKGating(k=2), load_loss_weight=0.3)
    layer(np.ones((2, 3, D), "float32"), training=True)
    assert len(layer.losses) == 2
    for options in ({}, {"load_loss_weight": 0.0}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(layers.TopKGating(k=2), **options)
            make(noisy(2), load_loss_weight=0.3)


def test_statistics_say_whether_their_load_is_a_count():
    indices, gates = tf.constant([[0], [1]]), tf.constant([[1.0], [1.0]])
    counted = F.make_gating_result(gates, indices, 2).statistics
    smooth = F.make_gating_result(gates, indices, 2, load=tf.ones(2)).statistics
    assert isinstance(counted, CountedStatistics)
    assert type(smooth) is GateStatistics
    assert type(counted._replace(load=tf.ones(2))) is GateStatistics
    assert type(counted._replace(importance=tf.ones(2))) is CountedStatistics
    again = tf.function(lambda: F.make_gating_result(gates, indices, 2))()
    assert type(again.statistics) is CountedStatistics


# A default gate that fits.


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (9, 4)])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: layers.MoE(experts(n)),
        lambda n: layers.MoELSTM(D, n),
        lambda n: layers.MoELSTMCell(D, n),
    ],
)
def test_the_default_gate_fits_any_number_of_experts(n, k, make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = make(n)
        again = type(layer).from_config(layer.get_config())
    for each in (layer, again):
        assert (each.gating.k, each.gating.num_experts) == (k, n)
        assert each.gating.normalization == ("all" if n == 2 else "selected")


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "k"),
    [(8, 2, (2, 2)), (4, 4, (2, 1)), (4, 1, (1, 2)), (1, 1, (1, 1))],
)
def test_the_default_k_of_two_levels_fits(num_experts, num_groups, k):
    layer = layers.HierarchicalMoE(experts(num_experts), num_groups)
    assert layer.k == k
    assert layer(np.ones((3, D), "float32")).shape == (3, D)


# Input of another kind.

X = np.ones((4, D), "float32")
RAGGED = tf.RaggedTensor.from_row_lengths(X, [1, 3])
LAYERS = {
    "MoE": lambda: layers.MoE(experts(), noisy(2)),
    "HierarchicalMoE": lambda: layers.HierarchicalMoE(experts(), 2, k=(2, 2)),
    "MoELSTM": lambda: layers.MoELSTM(D, 4, noisy(2)),
    "NoisyTopKGating": lambda: noisy(2, num_experts=4),
    "TopKGating": lambda: layers.TopKGating(2, 4),
    "SoftmaxGating": lambda: layers.SoftmaxGating(4),
    "BalancedGating": lambda: layers.BalancedGating(2, 4),
    "HierarchicalGating": lambda: layers.HierarchicalGating(2, num_experts=4),
}


def like(name, x):
    return x[:, np.newaxis] if name == "MoELSTM" else x


@pytest.mark.parametrize("name", LAYERS)
def test_inputs_that_are_not_one_dense_tensor_are_refused(name):
    x = like(name, X)
    with pytest.raises(ValueError, match=rf"`inputs` of {name} .*{{'a': .*}}"):
        LAYERS[name]()({"a": x})
    if name != "MoELSTM":  # there Keras says so
        with pytest.raises(ValueError, match=rf"`inputs` of {name} .*list of 2"):
            LAYERS[name]()([x, x])
    with pytest.raises(ValueError, match=rf"`inputs` of {name}.*SparseTensor"):
        LAYERS[name]()(tf.sparse.from_dense(x))
    if "Gating" not in name:
        with pytest.raises(ValueError, match=rf"`inputs` of {name}.*RaggedTensor"):
            LAYERS[name]()(RAGGED)
    built = LAYERS[name]()
    built(x)
    with pytest.raises(ValueError, match=rf"`inputs` of {name}.*dict|[Ee]xpect"):
        built({"a": x})


def test_the_remedy_for_ragged_inputs_gives_the_answers_of_the_rows():
    layer = LAYERS["MoE"]()
    answers = tf.ragged.map_flat_values(layer, RAGGED)
    np.testing.assert_allclose(answers.flat_values, layer(X), atol=1e-6)


@pytest.mark.parametrize("value", ["2", -1, 0, float("nan"), float("inf"), True, [2]])
def test_a_capacity_factor_that_is_none_is_refused_with_a_remedy_that_works(value):
    with pytest.raises(ValueError, match=r"`capacity_factor` .* None drops nothing"):
        layers.MoE(experts(), noisy(2), capacity_factor=value)
    with pytest.raises(ValueError, match="`capacity_factor`"):
        F.expert_capacity(8, 4, 2, value)


def test_weights_of_strings_are_refused():
    with pytest.raises(ValueError, match="importance_loss_weight='0.1'"):
        layers.MoE(experts(), noisy(2), importance_loss_weight="0.1")


def dense():
    return keras.layers.Dense(4, activation="softmax")


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda gate: layers.MoE(experts(), gate), "gating"),
        (lambda gate: layers.MoELSTM(D, 4, gate), "gating"),
        (lambda gate: layers.MoELSTMCell(D, 4, gate), "gating"),
        (lambda gate: hierarchical((2, 2), primary_gating=gate), "primary_gating"),
        (lambda gate: layers.HierarchicalGating(2, primary_gating=gate), "primary_gat"),
    ],
)
def test_a_layer_that_is_no_gate_is_refused(make, argument):
    with pytest.raises(ValueError, match=rf"`{argument}.*GatingResult.*Dense"):
        make(dense())


@keras.saving.register_keras_serializable(package="tests")
class Probabilities(keras.layers.Layer):
    """Is called as a gate, and returns a tensor."""

    num_experts = None

    def call(self, inputs, mask=None, training=None):
        return tf.nn.softmax(inputs[:, : self.num_experts])


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda gate: layers.MoE(experts(), gate), "gating"),
        (lambda gate: layers.MoELSTM(D, 4, gate), "gating"),
        (lambda gate: hierarchical((2, 2), primary_gating=gate), "primary_gating"),
    ],
)
def test_a_gate_that_returns_something_else_is_named(make, argument):
    layer = make(Probabilities())
    x = X[:, np.newaxis] if isinstance(layer, keras.layers.RNN) else X
    with pytest.raises(ValueError, match=rf"`{argument}` .*GatingResult"):
        layer(x)


def as_rows(layer, shape):
    return keras.Sequential([keras.layers.Reshape(shape), layer])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: keras.layers.Conv2D(3, 3, padding="same"), (6, 6, 3)),
        (lambda: keras.layers.LSTM(8), (4, 8)),
        (lambda: keras.layers.Conv1D(8, 3), (4, 8)),
    ],
)
def test_experts_over_whole_examples_are_told_to_reshape(make, shape, rng):
    gating = layers.TopKGating(k=1, normalization="all")
    x = rng.normal(size=(5, *shape)).astype("float32")
    name = type(make()).__name__
    with pytest.raises(ValueError, match=rf"`experts` .*{name}.*Reshape"):
        layers.MoE(layers.ExpertList([make(), make()]), gating)(x)
    # What the message says to do.
    listed = layers.ExpertList([as_rows(make(), shape) for _ in range(2)])
    if name != "LSTM":
        for expert in listed.experts:
            expert.add(keras.layers.Flatten())
    gating = layers.TopKGating(k=1, normalization="all")
    layer = layers.MoE(listed, gating)
    outputs = layer(x.reshape(5, -1)).numpy()
    result = layer.route(x.reshape(5, -1))
    for row, e, gate in zip(x, result.plan.expert_indices, result.gates, strict=True):
        alone = listed.experts[int(e[0])](row.reshape(1, -1))[0]
        np.testing.assert_allclose(
            outputs[0], float(gate[0]) * alone, rtol=1e-4, atol=1e-5
        )
        outputs = outputs[1:]


def test_route_of_a_symbolic_tensor_is_refused():
    with pytest.raises(ValueError, match=r"`inputs` of `route` .*KerasTensor"):
        LAYERS["MoE"]().route(keras.Input((D,)))


def test_an_own_gate_of_different_numbers_says_what_xla_cannot_do():
    class Ragged(keras.layers.Layer):
        num_experts = None

        def call(self, inputs, mask=None, training=None):
            tokens = tf.range(tf.shape(inputs)[0])
            gates = tf.ones_like(inputs[:, 0])
            return F.make_gating_result(
                gates, tokens % 2, self.num_experts, token_indices=tokens
            )

    layer = layers.MoE(experts(), Ragged(), load_loss_weight=0.0)
    layer(X)
    step = tf.function(lambda a: layer(a), jit_compile=True)
    with pytest.raises(ValueError, match=r"`jit_compile` .*numbers.*jit_compile=True"):
        step(tf.constant(X))
    with serving.gpu_operations():
        np.testing.assert_allclose(layer(X), tf.function(layer)(X), atol=1e-6)


def test_time_distributed_is_told_to_be_left_out():
    layer = LAYERS["MoE"]()
    x = np.ones((2, 3, D), "float32")
    with pytest.warns(UserWarning, match="Leave TimeDistributed out"):
        keras.layers.TimeDistributed(layer)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        # Around another layer that holds the mixture it is not what counts.
        keras.layers.TimeDistributed(keras.layers.Dense(3))(x)
