"""Dropout of hidden units inside experts."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, serving
from keras_moe.functional import expert_dropout
from tests import own_layers
from tests.oracles import experts as oracle
from tests.oracles import mixture as paper

N, D, E, K, H, RATE = 8, 4, 5, 2, 6, 0.4
WAYS = [{}, {"computation": "blocks"}, {"recompute": True}, {"gpu": True}]
WAYS += [{"recompute": True, "computation": "blocks"}, {"recompute": True, "gpu": True}]


def make(kind, units=H, dtype="float64", dropout=RATE, capacity=None, **options):
    experts = kind(E, units, dropout=dropout, seed=3, dtype=dtype, **options)
    return layers.MoE(
        experts,
        layers.TopKGating(K, dtype=dtype),
        importance_loss_weight=0.0,
        capacity_factor=capacity,
        dtype=dtype,
    )


def randomised(layer, rng):
    layer.build((None, D))
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def drawn(num_tokens, units):
    """The keys and functions of the first step of a layer of seed 3."""
    generator = keras.random.SeedGenerator(3)
    keys = keras.random.uniform((num_tokens, 4), dtype="float32", seed=generator)
    parts = keras.random.uniform((E, 4, units), dtype="float32", seed=generator)
    return np.floor(keys.numpy() * 256), np.floor(parts.numpy() * 65536)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["two hidden layers", "gated"])
def test_a_step_equals_the_oracle_in_value_and_every_gradient(rng, kind, way):
    options = {k: v for k, v in way.items() if k != "gpu"}
    if kind == "gated":
        layer, units = make(layers.GatedExperts, **options), H
    else:
        layer, units = make(layers.FeedForwardExperts, [H, 3], **options), H + 3
    randomised(layer, rng)
    keys, functions = drawn(N, units)
    weights = rng.normal(size=(N, D))

    def expected(x, gate_kernel, *kernels):
        gates = paper.top_k_gates(x @ gate_kernel, K)
        rows = []
        for token, key, gates_of_token in zip(x, keys, gates, strict=True):
            total = np.zeros(D)
            for e, gate in enumerate(gates_of_token):
                if gate != 0.0:
                    kept = oracle.kept_units(key, functions[e], RATE)
                    total += gate * answer(token, [k[e] for k in kernels], kept)
            rows.append(total)
        return np.array(rows)

    def answer(token, kernels, kept):
        if kind == "gated":
            a, b, c = kernels
            hidden = oracle.silu(token @ a) * (token @ b)
            return oracle.dropped(hidden, kept, RATE) @ c
        a, b, c = kernels
        first = oracle.dropped(paper.relu(token @ a), kept[:H], RATE)
        return oracle.dropped(paper.relu(first @ b), kept[H:], RATE) @ c

    x = rng.normal(size=(N, D))
    variables = [layer.gating.gate_kernel, *layer.experts.kernels]
    arrays = [x, *(v.numpy() for v in variables)]

    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=True)
            total = tf.reduce_sum(outputs * weights)
        return outputs, tape.gradient(total, [x, *(v.value for v in variables)])

    with serving.gpu_operations() if way.get("gpu") else contextlib.nullcontext():
        outputs, found = run(tf.constant(x))
    np.testing.assert_allclose(outputs, expected(*arrays), rtol=1e-9, atol=1e-12)
    numbers = paper.numerical_gradients(
        lambda *a: float(np.sum(weights * expected(*a))), arrays
    )
    for gradient, number in zip(found, numbers, strict=True):
        np.testing.assert_allclose(gradient, number, rtol=1e-5, atol=1e-7)


def test_units_are_dropped_at_the_rate_and_independently(rng):
    tokens, units, rate = 4000, 60, 0.3
    keys = expert_dropout.keys_of(tf.constant(rng.random((tokens, 4)), tf.float32))
    parts = tf.constant(rng.random((2, 4, units)), tf.float32)
    functions = expert_dropout.functions_of(parts)
    kept = expert_dropout.kept(tf.stack([keys, keys]), functions, rate).numpy()
    wanted = [
        [oracle.kept_units(k, f, rate) for k in keys.numpy()[:20]]
        for f in functions.numpy()
    ]
    np.testing.assert_array_equal(kept[:, :20], wanted)
    kept = np.concatenate(list(kept), axis=1).astype("float64")  # of both experts
    deviation = np.sqrt(rate * (1 - rate))
    # Means over tokens of 120 units, over units of 4,000 tokens.
    assert np.abs(kept.mean(axis=0) - 0.7).max() < 4.5 * deviation / tokens**0.5
    assert np.abs(kept.mean(axis=1) - 0.7).max() < 5.5 * deviation / 120**0.5
    # Correlations of pairs of units have a standard deviation of 1 / sqrt(tokens); one
    # expert's units and the other's for the same token are among them.
    pairs = np.corrcoef(kept.T)[np.triu_indices(120, 1)]
    assert np.abs(pairs).max() < 6.0 / tokens**0.5
    assert np.std(pairs) == pytest.approx(tokens**-0.5, rel=0.1)
    # Pairs of tokens, over units.
    pairs = np.corrcoef(kept[:300])[np.triu_indices(300, 1)]
    assert np.std(pairs) == pytest.approx(120**-0.5, rel=0.1)


@pytest.mark.parametrize(
    "kind", [layers.FeedForwardExperts, own_layers.ResidualExperts]
)
def test_it_is_of_training_only_differs_between_steps_and_repeats(rng, kind):
    first, second = (make(kind, dtype="float32") for _ in range(2))
    x = rng.normal(size=(N, D)).astype("float32")
    plain = make(kind, dtype="float32", dropout=0.0)
    for layer in (first, second, plain):
        randomised(layer, np.random.default_rng(0))
    np.testing.assert_array_equal(first(x), plain(x))
    steps = [first(x, training=True).numpy() for _ in range(2)]
    assert np.abs(steps[0] - steps[1]).max() > 0.1
    assert np.abs(steps[0] - plain(x)).max() > 0.1
    for step in steps:
        np.testing.assert_array_equal(second(x, training=True), step)


def test_padding_and_a_capacity_change_no_mask(rng):
    layer, wide = (
        randomised(make(layers.GatedExperts, capacity=c), np.random.default_rng(0))
        for c in (None, 5.0)
    )
    x, mask = rng.normal(size=(N, D)), np.arange(N) % 3 > 0
    expected = np.zeros((N, D))
    expected[mask] = layer(x[mask], training=True)
    x[~mask] = np.nan
    found = wide(x, mask=mask, training=True)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_experts_by_themselves_drop_too(rng):
    experts = layers.FeedForwardExperts(
        2, 1000, dropout=0.25, activation="linear", kernel_initializer="ones"
    )
    rows = np.ones((2, 3, 1), "float32")
    found = experts(rows, training=True).numpy() / 1000  # share kept / 0.75
    assert np.abs(found - 1.0).max() < 5 * (0.25 / 0.75 / 1000) ** 0.5
    assert len(np.unique(found)) > 3
    sorted_rows = np.ones((5, 1), "float32")
    found = experts(sorted_rows, counts=np.array([3, 2]), training=True)
    assert len(np.unique(found)) > 2
    np.testing.assert_allclose(experts(rows), np.full((2, 3, 1), 1000.0))


@pytest.mark.slow
def test_compiled_by_xla_the_backward_pass_has_the_same_mask(rng):
    layer = randomised(make(layers.GatedExperts, recompute=True), rng)
    kernel = layer.experts.kernels[-1].value

    @tf.function(jit_compile=True, autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(tf.sin(x) * layer(x, training=True))
        return total, tape.gradient(total, kernel)

    total, gradient = run(tf.constant(rng.normal(size=(N, D))))
    # The answer is linear in the last kernel.
    np.testing.assert_allclose(tf.reduce_sum(gradient * kernel), total, rtol=1e-9)


def test_without_it_there_is_no_weight_more_and_bad_rates_are_refused():
    for kind in (layers.FeedForwardExperts, layers.GatedExperts):
        experts = kind(2, 3)
        experts.build((None, D))
        assert len(experts.variables) == len(experts.kernels)
        with pytest.raises(ValueError, match="`dropout`.*1.0"):
            kind(2, 3, dropout=1.0)
        with pytest.raises(ValueError, match="`seed`.*1.5"):
            kind(2, 3, seed=1.5)
