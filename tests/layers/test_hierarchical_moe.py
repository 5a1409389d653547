import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional as F
from keras_moe import layers, serving
from keras_moe.types import GatingResult
from tests.oracles import mixture as oracle

N, D, H, G, B = 11, 5, 4, 3, 4  # tokens, features, hidden, groups, group size


def make(num_groups=G, k=(2, 2), num_experts=G * B, **options):
    return layers.HierarchicalMoE(
        layers.FeedForwardExperts(num_experts, H, dtype="float64"),
        num_groups,
        k=k,
        dtype="float64",
        **options,
    )


def randomised(layer, rng, features=D):
    layer.build((None, features))
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def dense_enumeration(x, primary, secondary, first, second, k):
    """Equation 12 over all groups and all experts, in inference."""
    outer = oracle.top_k_gates(x @ primary, k[0])
    outputs = np.zeros((len(x), second.shape[2]))
    for i in range(secondary.shape[0]):
        inner = oracle.top_k_gates(x @ secondary[i], k[1])
        for j in range(secondary.shape[2]):
            e = i * secondary.shape[2] + j
            for n in range(len(x)):
                gate = outer[n, i] * inner[n, j]
                outputs[n] += gate * oracle.feed_forward(x[n], [first[e], second[e]])
    return outputs


@pytest.mark.parametrize("k", [(2, 2), (1, 3), (3, 1), (3, 4)])
def test_equals_dense_enumeration_in_value_and_every_gradient(rng, k):
    layer = randomised(make(k=k), rng)
    x = rng.normal(size=(N, D))
    weights = rng.normal(size=(N, D))
    variables = [
        layer.gating.primary_gating.gate_kernel.value,
        layer.gating.gate_kernel.value,
        *(kernel.value for kernel in layer.experts.kernels),
    ]
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, training=False)
        total = tf.reduce_sum(outputs * weights)
    arrays = [x, *(v.numpy() for v in variables)]
    np.testing.assert_allclose(outputs, dense_enumeration(*arrays, k), atol=1e-9)
    expected = oracle.numerical_gradients(
        lambda *a: float(np.sum(weights * dense_enumeration(*a, k))), arrays
    )
    for gradient, wanted in zip(
        tape.gradient(total, [inputs, *variables]), expected, strict=True
    ):
        np.testing.assert_allclose(
            tf.convert_to_tensor(gradient), wanted, rtol=1e-5, atol=1e-6
        )


def flat_twin(layer, gate_kernel, k):
    """A flat MoE with the experts of a hierarchical one."""
    experts = layers.FeedForwardExperts(layer.num_experts, H, dtype="float64")
    flat = layers.MoE(
        experts,
        layers.NoisyTopKGating(k=k, dtype="float64"),
        dtype="float64",
        losses_in_evaluation=True,
    )
    flat.build((None, D))
    experts.set_weights(layer.experts.get_weights())
    flat.gating.gate_kernel.assign(gate_kernel)
    return flat


def test_one_group_is_flat(rng):
    layer = randomised(make(1, (1, 2), 6, losses_in_evaluation=True), rng)
    flat = flat_twin(layer, layer.gating.gate_kernel[0], k=2)
    x = rng.normal(size=(N, D))
    np.testing.assert_allclose(layer(x), flat(x), atol=1e-12)
    np.testing.assert_allclose(layer.losses, flat.losses, atol=1e-12)


def test_one_expert_a_group_is_flat(rng):
    layer = randomised(make(6, (2, 1), 6, losses_in_evaluation=True), rng)
    flat = flat_twin(layer, layer.gating.primary_gating.gate_kernel, k=2)
    x = rng.normal(size=(N, D))
    np.testing.assert_allclose(layer(x), flat(x), atol=1e-12)
    np.testing.assert_allclose(layer.losses, flat.losses, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_importance_sums_to_the_number_of_tokens(rng, training):
    layer = randomised(make(), rng)
    statistics = layer.gating(rng.normal(size=(N, D)), training=training).statistics
    assert float(tf.reduce_sum(statistics.importance)) == pytest.approx(N, rel=1e-9)
    assert int(tf.reduce_sum(statistics.counts)) == N * 2 * 2


def test_expected_load_sums_to_k1_times_k2_times_tokens(rng):
    layer = randomised(make(), rng)
    x = np.repeat(rng.normal(size=(40, D)), 100, axis=0)
    load = layer.gating(x, training=True).statistics.load
    # Sum of 4,000 tokens, each with mean k1 * k2 = 4 and a spread below 2.
    assert float(tf.reduce_sum(load)) == pytest.approx(4 * 4000, rel=4 * 2 / 4 / 63)


def test_load_loss_reaches_primary_and_secondary_gates(rng):
    layer = randomised(make(importance_loss_weight=0.0), rng)
    variables = [v.value for v in layer.gating.trainable_variables]
    assert len(variables) == 4  # gate and noise kernels of both levels
    with tf.GradientTape() as tape:
        layer(rng.normal(size=(N, D)), training=True)
        (loss,) = layer.losses
    for gradient in tape.gradient(loss, variables):
        assert np.abs(gradient).max() > 1e-6


def test_padding_is_neither_routed_nor_counted(rng):
    layer = randomised(make(losses_in_evaluation=True), rng)
    x = rng.normal(size=(2, 6, D))
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]], bool)
    outputs = layer(x, mask=mask).numpy()
    losses = [float(loss) for loss in layer.losses]
    np.testing.assert_array_equal(outputs[~mask], 0.0)
    np.testing.assert_allclose(outputs[mask], layer(x[mask]), atol=1e-12)
    np.testing.assert_allclose(losses, layer.losses, rtol=1e-12)


def test_padding_with_a_capacity_that_nothing_exceeds(rng):
    options = {"losses_in_evaluation": True}
    layer = randomised(make(capacity_factor=float(G * B), **options), rng)
    dropless = randomised(make(**options), np.random.default_rng(0))
    dropless.set_weights(layer.get_weights())
    x = rng.normal(size=(2, 6, D))
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]], bool)
    np.testing.assert_allclose(layer(x, mask=mask), dropless(x, mask=mask), atol=1e-12)
    np.testing.assert_allclose(layer.losses, dropless.losses, rtol=1e-12)


def test_no_array_of_tokens_by_experts_is_built():
    layer = layers.HierarchicalMoE(layers.FeedForwardExperts(4096, 2), num_groups=64)
    layer.build((None, 8))

    @tf.function
    def gate(x):
        return layer.gating(x, training=True)

    graph = gate.get_concrete_function(tf.TensorSpec((37, 8), tf.float32)).graph
    shapes = [out.shape for op in graph.get_operations() for out in op.outputs]
    wide = [s for s in shapes if s.rank and 4096 in s.as_list() and s.rank > 1]
    assert len(shapes) > 100
    assert wide == []


@keras.saving.register_keras_serializable(package="tests")
class EveryOther(keras.layers.Layer):
    """A gate of a user's: tokens go by their position, gates are equal."""

    num_experts = None

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        n = tf.shape(inputs)[0]
        first = tf.range(n) % self.num_experts
        experts = tf.stack([first, (first + 1) % self.num_experts], axis=1)
        gates = tf.fill(tf.shape(experts), tf.constant(0.5, inputs.dtype))
        return F.make_gating_result(gates, experts, self.num_experts, mask=mask)


@pytest.mark.parametrize("kind", ["flat", "hierarchical"])
def test_a_gate_of_ones_own_plugs_in(rng, kind, tmp_path):
    experts = layers.FeedForwardExperts(6, H)
    if kind == "flat":
        layer = layers.MoE(experts, EveryOther())
    else:
        layer = layers.HierarchicalMoE(experts, 3, primary_gating=EveryOther())
    model = keras.Sequential([keras.Input((4, D)), layer])
    model.compile("sgd", "mse")
    x = rng.normal(size=(8, 4, D)).astype("float32")
    model.fit(x, x, verbose=0)
    path = tmp_path / "own.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(loaded(x), model(x))
    counts = loaded.layers[0].gating(x.reshape(-1, D)).statistics.counts
    # 32 tokens over 6 experts (or 3 groups of 2), two each in turn.
    assert int(tf.reduce_sum(counts)) == (64 if kind == "flat" else 32 * 2 * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 5}, "num_experts=12, num_groups=5"),
        ({"num_groups": 0}, "num_groups=0"),
        ({"k": (4, 1)}, r"k=\(4, 1\), num_groups=3, 4 experts a group"),
        ({"k": (1, 5)}, r"k=\(1, 5\), num_groups=3, 4 experts a group"),
        ({"k": 2}, "k=2"),
        ({"k": (0, 1)}, "k=0"),
        ({"primary_gating": "softmax"}, "'softmax'"),
        ({"primary_gating": layers.TopKGating(1, 7)}, "num_experts=7, num_groups=3"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_groups_that_take_no_token_have_no_experts_eagerly_on_a_gpu():
    """The strictly balanced gate leaves a token without a group, by -1."""
    moe = layers.HierarchicalMoE(
        layers.FeedForwardExperts(8, 8),
        num_groups=4,
        k=(1, 2),
        primary_gating=layers.BalancedGating(k=1),
    )
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    moe.build(x.shape)
    for weight in moe.trainable_variables:
        weight.assign(tf.random.stateless_normal(weight.shape, (1, 2)))
    expected = moe(x)
    with serving.gpu_operations():
        np.testing.assert_allclose(moe(x), expected, rtol=1e-5, atol=1e-5)
        chosen = moe.route(x).expert_indices.numpy()
    assert chosen.min() == -1
    traced = tf.function(moe)(x)
    np.testing.assert_allclose(traced, expected, rtol=1e-5, atol=1e-5)
