"""Slots are for real tokens, and evaluation has a capacity of its own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional as F
from keras_moe import layers

D, E = 6, 4


def make(capacity_factor=1.0, k=1, experts=None, gate=None, **options):
    gating = gate or layers.TopKGating(k=k, normalization="all")
    experts = experts or layers.FeedForwardExperts(E, 5)
    layer = layers.MoE(experts, gating, capacity_factor=capacity_factor, **options)
    layer.build((None, None, D))
    return layer


def groups(**options):
    options = {"capacity_factor": 1.0, **options}
    layer = layers.HierarchicalMoE(layers.FeedForwardExperts(8, 5), 4, **options)
    layer.build((None, None, D))
    for kernel in layer.gating.trainable_variables:
        kernel.assign(np.random.default_rng(1).normal(size=kernel.shape))
    return layer


def overflow_of(layer, *arguments, **options):
    layer.balance.reset_state()
    outputs = layer(*arguments, **options)
    return outputs.numpy(), float(layer.balance.totals()["overflow"])


@pytest.fixture
def x(rng):
    return rng.normal(size=(2, 16, D)).astype("float32")


PLACES = {
    "behind": np.arange(32) < 16,
    "before": np.arange(32) >= 16,
    "between": np.arange(32) % 2 == 0,
}


def padded(x, places):
    """Twice as long, the real tokens where `places` says, NaN elsewhere."""
    mask = np.broadcast_to(places, (len(x), 32))
    longer = np.full((len(x), 32, D), np.nan, "float32")
    longer[mask] = x.reshape(-1, D)
    return longer, mask


NOISY = {"gate_initializer": "glorot_uniform", "seed": 3}
MADE = {
    "top-1": make,
    "top-2": lambda **options: make(k=2, **options),
    "noisy": lambda **options: make(
        gate=layers.NoisyTopKGating(k=2, **NOISY), **options
    ),
    "groups": lambda **options: groups(
        primary_gating=layers.NoisyTopKGating(k=2, **NOISY), **options
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MADE)
def test_padding_takes_no_slot_and_makes_none(x, kind, training, place):
    keras.utils.set_random_seed(0)
    layer = MADE[kind](evaluation_capacity_factor=1.0)
    states = [v.value.numpy() for v in layer.non_trainable_variables]
    expected, dropped = overflow_of(layer, x, training=training)
    assert dropped > 0.0
    for variable, state in zip(layer.non_trainable_variables, states, strict=True):
        variable.assign(state)  # the same noise again
    longer, mask = padded(x, PLACES[place])
    found, also_dropped = overflow_of(layer, longer, mask=mask, training=training)
    np.testing.assert_allclose(found[mask], expected.reshape(-1, D), atol=1e-6)
    np.testing.assert_array_equal(found[~mask], 0.0)
    assert also_dropped == dropped


@pytest.mark.parametrize("training", [True, False])
def test_padding_makes_no_slots_where_xla_compiles(x, training):
    keras.utils.set_random_seed(0)
    layer = make(evaluation_capacity_factor=1.0)

    @tf.function(jit_compile=True)
    def run(x, mask=None):
        return layer(x, mask=mask, training=training)

    longer, mask = padded(x, PLACES["between"])
    np.testing.assert_allclose(
        run(longer, tf.constant(mask)).numpy()[mask],
        layer(x, training=training).numpy().reshape(-1, D),
        atol=1e-6,
    )
    np.testing.assert_allclose(run(x), layer(x, training=training), atol=1e-6)


def listed():
    return layers.ExpertList([keras.layers.Dense(D) for _ in range(E)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("experts", [None, listed])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_nothing_is_dropped_in_evaluation_unless_asked_for(
    x, rng, jit_compile, experts, masked
):
    keras.utils.set_random_seed(0)
    layer = make(0.5, k=2, experts=experts and experts())
    # Skewed: the first experts get most of the tokens, so that rounds differ.
    layer.gating.gate_kernel.assign(
        layer.gating.gate_kernel.numpy() + np.array([2.0, 1.0, 0.0, -9.0])
    )
    x = np.abs(x)
    mask = rng.uniform(size=x.shape[:2]) < 0.7 if masked else None
    dropless = layers.MoE(layer.experts, layer.gating)
    dropless.build(x.shape)

    @tf.function(jit_compile=jit_compile)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, mask=mask, training=False)
        return outputs, tape.gradient(outputs, x), layer.balance.result()

    inputs = tf.constant(x)
    outputs, gradient, figures = run(inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        expected = dropless(inputs, mask=mask, training=False)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, tape.gradient(expected, inputs), atol=1e-5)
    assert float(figures[f"{layer.name}_overflow"]) == 0.0
    assert overflow_of(layer, x, mask=mask, training=True)[1] > 0.0


def test_evaluation_may_have_another_capacity(x):
    # Everything goes to expert 0: of 32 tokens 8 in training, 16 in evaluation.
    layer = make(evaluation_capacity_factor=2.0)
    layer.gating.gate_kernel.assign(np.zeros((D, E)))
    assert overflow_of(layer, x, training=True)[1] == 32 - 8
    assert overflow_of(layer, x, training=False)[1] == 32 - 16
    only = make(None, evaluation_capacity_factor=2.0)
    only.gating.gate_kernel.assign(np.zeros((D, E)))
    assert overflow_of(only, x, training=True)[1] == 0
    assert overflow_of(only, x)[1] == 32 - 16


def test_the_overflow_in_the_logs_is_that_of_each_capacity(x):
    layer = make(name="moe")
    layer.gating.gate_kernel.assign(np.zeros((D, E)))
    model = keras.Sequential([keras.Input((16, D)), layer])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=True)
    history = model.fit(x, x, validation_data=(x, x), verbose=0).history
    assert history["moe_overflow"] == [pytest.approx(24 / 32)]
    assert history["val_moe_overflow"] == [0.0]


@pytest.mark.parametrize("make", [make, groups])
def test_a_layer_of_before_has_one_capacity_for_both(make):
    layer = make(capacity_factor=1.5)
    config = layer.get_config()
    assert config["evaluation_capacity_factor"] is None
    assert type(layer).from_config(config).evaluation_capacity_factor is None
    del config["evaluation_capacity_factor"]
    assert type(layer).from_config(config).evaluation_capacity_factor == 1.5


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), "much"])
def test_refuses_a_bad_capacity_of_evaluation(factor):
    with pytest.raises(
        ValueError, match=r"`evaluation_capacity_factor`.*within \(0, inf\)"
    ):
        make(evaluation_capacity_factor=factor)


def test_no_expert_takes_no_slot():
    plan = F.make_capacity_plan([[0, -1], [0, 1]], 2, 1)
    assert plan.token_indices.numpy().tolist() == [[0], [1]]
    assert plan.positions.numpy().tolist() == [[0, -1], [-1, 1]]
    assert int(plan.overflow) == 1
