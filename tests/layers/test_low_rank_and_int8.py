"""Experts whose kernels are adapted by low-rank additions, or held in eight bits."""

import contextlib
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional, layers, serving
from keras_moe.functional.kernels import Kernel, product
from tests import own_layers
from tests.oracles import experts as oracle
from tests.oracles import mixture as paper

N, D, E, K, H = 8, 4, 5, 2, 3
# How rows are computed. On a GPU there are static slots.
WAYS = [{}, {"computation": "blocks"}, {"recompute": True}, {"gpu": True}]
WAYS += [{"recompute": True, "computation": "blocks"}, {"recompute": True, "gpu": True}]
REST = [pytest.mark.slow, pytest.mark.exhaustive]
CASES = [(layers.GatedExperts, way) for way in WAYS]
CASES += [(layers.FeedForwardExperts, WAYS[0])]
CASES += [pytest.param(layers.FeedForwardExperts, way, marks=REST) for way in WAYS[1:]]


def make(kind, rng, way=None, dtype="float64", **options):
    way = {k: v for k, v in (way or {}).items() if k != "gpu"}
    experts = kind(E, H, use_bias=True, dtype=dtype, **way, **options)
    layer = layers.MoE(experts, layers.TopKGating(K, dtype=dtype), dtype=dtype)
    layer.build((None, D))
    for variable in layer.variables:
        if variable.dtype == dtype:
            variable.assign(rng.normal(size=variable.shape))
    return layer


def answer(kind, kernels, biases):
    """Expert e on one token, in float64."""

    def expert(e, token):
        own, own_biases = [k[e] for k in kernels], [b[e] for b in biases]
        if kind is layers.GatedExperts:
            return oracle.gated(token, own, own_biases)
        return paper.feed_forward(token, own, own_biases)

    return expert


def assert_value_and_gradients(layer, x, sources, expected, way):
    """Values, and gradients with regard to x, the gate and `sources`."""
    variables = [layer.gating.gate_kernel, *sources]
    weights = np.random.default_rng(1).normal(size=(N, D))

    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x)
            total = tf.reduce_sum(outputs * weights)
        of_kernels = [k.value for k in layer.experts.kernels]
        of_kernels = [k for k in of_kernels if k.dtype.is_floating]
        every = [x, *(v.value for v in variables), *of_kernels]
        found = tape.gradient(total, every)
        number = len(variables) + 1
        assert all(gradient is None for gradient in found[number:])
        return outputs, found[:number]

    place = serving.gpu_operations if way.get("gpu") else contextlib.nullcontext
    with place():
        outputs, found = run(tf.constant(x))

    def wanted(x, gate_kernel, *arrays):
        gates = paper.top_k_gates(x @ gate_kernel, K)
        return oracle.mixture(x, gates, expected(*arrays))

    arrays = [x, *(v.numpy() for v in variables)]
    np.testing.assert_allclose(outputs, wanted(*arrays), rtol=1e-9)
    numbers = paper.numerical_gradients(
        lambda *a: float(np.sum(weights * wanted(*a))), arrays
    )
    for gradient, number in zip(found, numbers, strict=True):
        np.testing.assert_allclose(gradient, number, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "way"), CASES, ids=str)
def test_low_rank_additions_equal_the_oracle_in_value_and_every_gradient(
    rng, kind, way
):
    layer = make(kind, rng, way, lora_rank=2, lora_alpha=3.0)
    experts, n = layer.experts, len(layer.experts.kernels)
    kernels = [k.numpy() for k in experts.kernels]

    def expected(*arrays):
        a, b, biases = arrays[:n], arrays[n : 2 * n], arrays[2 * n :]
        whole = [
            [oracle.low_rank(w[e], p[e], q[e], 1.5) for e in range(E)]
            for w, p, q in zip(kernels, a, b, strict=True)
        ]
        return answer(kind, whole, biases)

    sources = [*experts.lora_kernels_a, *experts.lora_kernels_b, *experts.biases]
    x = rng.normal(size=(N, D))
    assert_value_and_gradients(layer, x, sources, expected, way)


@pytest.mark.parametrize(("kind", "way"), CASES, ids=str)
def test_kernels_of_eight_bits_equal_the_oracle_in_value_and_every_gradient(
    rng, kind, way
):
    layer = make(kind, rng, way)
    kernels = [k.numpy() for k in layer.experts.kernels]
    layer.experts.quantize("int8")
    for found, scales, kernel in zip(
        layer.experts.kernels, layer.experts.kernel_scales, kernels, strict=True
    ):
        parts = [oracle.eight_bits(each) for each in kernel]
        np.testing.assert_array_equal(found, [part[0] for part in parts])
        np.testing.assert_allclose(scales, [part[1] for part in parts], rtol=1e-6)
        assert found.dtype == "int8"
        assert not found.trainable
    whole = [
        k.numpy() / s.numpy()[:, np.newaxis]
        for k, s in zip(layer.experts.kernels, layer.experts.kernel_scales, strict=True)
    ]
    x = rng.normal(size=(N, D))
    assert_value_and_gradients(
        layer, x, layer.experts.biases, lambda *b: answer(kind, whole, b), way
    )


def test_a_product_in_eight_bits_is_as_near_as_stated(rng):
    x, kernel = rng.normal(size=(E, N, D)), rng.normal(size=(E, D, H))
    kernel[0, :, 0] = 0.0
    parts = [oracle.eight_bits(each) for each in kernel]
    value, scale = (np.stack(each) for each in zip(*parts, strict=True))
    found = product(tf.constant(x), Kernel(tf.constant(value), tf.constant(scale)))
    apart = np.abs(found - x @ kernel)
    # Half a step of 1/127 of the largest element of the column, for each element.
    largest = np.abs(kernel).max(axis=1, keepdims=True) + 1e-7
    bound = np.abs(x).sum(axis=2, keepdims=True) * largest / 254
    assert np.all(apart <= bound)
    assert np.max(apart / bound) > 0.1  # no looser than it has to be


def model_of(kind, **options):
    layer = layers.MoE(kind(E, H, use_bias=True, **options), layers.TopKGating(K))
    return keras.Sequential([keras.Input((D,)), layer, keras.layers.Dense(D)])


# A subclass with a network of its own gets whole kernels. The rest takes seconds.
EVERY = [layers.GatedExperts]
EVERY += [
    pytest.param(kind, marks=[pytest.mark.slow, pytest.mark.exhaustive])
    for kind in (layers.FeedForwardExperts, own_layers.ResidualExperts)
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_low_rank_training_leaves_kernels_and_files_hold_the_sum(rng, kind, tmp_path):
    model = model_of(kind)
    experts, x = model.layers[0].experts, rng.normal(size=(N, D)).astype("float32")
    before = model(x)
    experts.enable_lora(2, a_initializer="glorot_normal", lora_alpha=4)
    np.testing.assert_allclose(model(x), before, atol=1e-6)  # B is zero
    names = [w.name for w in experts.trainable_weights]
    assert len(names) == 3 * len(experts.kernels)
    assert all(name.startswith(("lora_", "bias_")) or "bias" in name for name in names)
    kernels = [k.numpy() for k in experts.kernels]
    model.compile(keras.optimizers.Adam(0.1), "mse")
    losses = model.fit(x, x, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for kernel, old in zip(experts.kernels, kernels, strict=True):
        np.testing.assert_array_equal(kernel, old)
    assert all(np.abs(b).max() > 0 for b in experts.lora_kernels_b)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].experts.lora_rank == 2
    assert loaded.layers[0].experts.lora_alpha == 4
    np.testing.assert_allclose(loaded(x), model(x), atol=1e-5)
    loaded.fit(x, x, verbose=0)  # A still moves B
    assert np.abs(loaded.layers[0].experts.lora_kernels_b[0]).max() > 0
    # A model without additions takes the sum.
    model.save_weights(tmp_path / "model.weights.h5")
    plain = model_of(kind)
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(plain(x), model(x), atol=1e-5)
    # A checkpoint has the parts.
    path = tf.train.Checkpoint(experts=experts).write(str(tmp_path / "checkpoint"))
    other = model_of(kind, lora_rank=2, lora_alpha=4).layers[0].experts
    tf.train.Checkpoint(experts=other).read(path).assert_consumed()
    for found, wanted in zip(other.weights, experts.weights, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_a_model_in_eight_bits_predicts_trains_beside_and_is_saved(rng, kind, tmp_path):
    model = model_of(kind)
    experts, x = model.layers[0].experts, rng.normal(size=(N, D)).astype("float32")
    before, gate = model(x), model.layers[0].gating.get_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*InputLayer")  # Keras' own
        model.quantize("int8")
    assert experts.dtype_policy.name == "int8_from_float32"
    assert sum(k.numpy().nbytes for k in experts.kernels) == sum(
        k.numpy().size for k in experts.kernels
    )
    np.testing.assert_array_equal(model.layers[0].gating.get_weights()[0], gate[0])
    apart = np.abs(model(x) - before).max()
    assert 0 < apart < 0.05 * np.abs(before).max()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    kernels = [k.numpy() for k in experts.kernels]
    experts.enable_lora(2)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    losses = model.fit(x, x, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for kernel, old in zip(experts.kernels, kernels, strict=True):
        np.testing.assert_array_equal(kernel, old)
    # The sum is rounded again.
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert 0 < np.abs(loaded(x) - model(x)).max() < 0.05 * np.abs(model(x)).max()
    path = serving.export(loaded, tmp_path / "exported")
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    (name,) = served.structured_input_signature[1]
    found = served(**{name: tf.constant(x)})["outputs"]
    np.testing.assert_allclose(found, loaded(x), atol=1e-5)


def test_frozen_experts_have_no_low_rank_gradient_either(rng):
    experts = layers.FeedForwardExperts(3, H, lora_rank=2, frozen_experts=(1,))
    x = rng.normal(size=(3, N, D)).astype("float32")
    experts(x)
    for b in experts.lora_kernels_b:
        b.assign(rng.normal(size=b.shape))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(experts(x) ** 2)
    for gradient in tape.gradient(total, [w.value for w in experts.trainable_weights]):
        moved = np.abs(gradient).reshape(3, -1).max(axis=1) > 0
        np.testing.assert_array_equal(moved, [True, False, True])


def test_additions_are_drawn_for_each_expert_and_regularized(rng):
    experts = layers.FeedForwardExperts(
        40, 60, kernel_regularizer=keras.regularizers.L2(0.5), lora_rank=30
    )
    experts.build((None, 50))
    a = experts.lora_kernels_a[0].numpy()
    # He: variance 2 / fan_in of one expert.
    assert a.std() == pytest.approx((2 / 50) ** 0.5, rel=0.02)
    assert np.abs(a[0] - a[1]).max() > 0.01
    parts = [*experts.lora_kernels_a, *experts.lora_kernels_b]
    wanted = 0.5 * sum(np.sum(part.numpy() ** 2) for part in parts)
    np.testing.assert_allclose(tf.add_n(experts.losses), wanted, rtol=1e-5)


def test_low_rank_weights_are_of_single_precision_at_least():
    for policy, wanted in (("bfloat16", "float32"), ("float64", "float64")):
        experts = layers.GatedExperts(2, H, lora_rank=1, dtype=policy)
        experts(tf.ones((2, 3, D), policy))
        assert {w.dtype for w in experts.lora_kernels_a} == {wanted}


def test_bad_adaptations_are_refused():
    experts = layers.FeedForwardExperts(2, H)
    with pytest.raises(ValueError, match="`enable_lora` needs a built layer"):
        experts.enable_lora(2)
    experts.build((None, D))
    with pytest.raises(ValueError, match="rank=0"):
        experts.enable_lora(0)
    with pytest.raises(ValueError, match="`lora_rank` must be.*lora_rank=0"):
        layers.GatedExperts(2, H, lora_rank=0)
    for alpha in ("a", 0, float("nan")):
        with pytest.raises(ValueError, match=f"`lora_alpha` must be.*={alpha!r}"):
            layers.GatedExperts(2, H, lora_rank=2, lora_alpha=alpha)
        with pytest.raises(ValueError, match=f"`lora_alpha` must be.*={alpha!r}"):
            experts.enable_lora(2, lora_alpha=alpha)
    assert not experts.lora_enabled
    experts.enable_lora(2)
    with pytest.raises(ValueError, match="second call"):
        experts.enable_lora(2)
    with pytest.raises(ValueError, match="`kernel_constraint` must be None"):
        layers.GatedExperts(2, H, kernel_constraint="non_neg", lora_rank=2)
    with pytest.raises(NotImplementedError, match="mode='float8'"):
        experts.quantize("float8")
    experts.quantize("int8")
    with pytest.raises(ValueError, match="already quantized"):
        experts.quantize("int8")


def test_functional_experts_take_weights_of_whole_numbers(rng):
    # A network of one's own: signs of an expert.
    signs = rng.choice([-1, 1], size=(E, D, H)).astype("int8")
    plan = functional.make_dispatch_plan(rng.integers(0, E, (N, K)), E)
    x, gates = tf.constant(rng.normal(size=(N, D))), tf.ones((N, K), tf.float64)

    def network(rows, signs):
        return tf.matmul(rows, tf.cast(signs, rows.dtype))

    gradients = []
    for options in ({}, {"recompute": True}, {"computation": "blocks"}):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = functional.mix_experts(
                network, x, gates, plan, [tf.constant(signs)], **options
            )
        gradients.append(tape.gradient(y, x))
        np.testing.assert_allclose(gradients[-1], gradients[0])
