"""A whole mixture compiles with XLA, drops nothing, and is the same as without."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, models, serving

D, TOKENS = 4, 12


def experts(number=6, **options):
    return layers.FeedForwardExperts(number, 3, **options)


def top_k():
    return layers.TopKGating(k=2, gate_initializer="glorot_normal")


def step_of(layer, masked, jit_compile, batch_size, noise=None):
    """A function that gives outputs, losses, and gradients of x and all weights."""
    weights = [variable.value for variable in layer.trainable_variables]

    def step(x, mask):
        if noise is not None:  # XLA draws other numbers from a seed
            layer.gating.draw_noise = lambda num_tokens, mask=None: noise[:num_tokens]
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, mask=mask if masked else None, training=True)
            total = tf.reduce_sum(tf.sin(3.0 * outputs)) + sum(layer.losses)
        gradients = tape.gradient(total, [x, *weights], unconnected_gradients="zero")
        return outputs, list(layer.losses), gradients

    shape = (batch_size, 3, D)
    signature = [tf.TensorSpec(shape), tf.TensorSpec(shape[:2], tf.bool)]
    return tf.function(step, signature, jit_compile=jit_compile, autograph=False)


def assert_same(layer, masked=False, batch_size=None, noise=None, dtype_limit=1e-5):
    rng = np.random.default_rng(3)
    x = tf.constant(rng.normal(size=(TOKENS // 3, 3, D)), tf.float32)
    mask = tf.constant(rng.random((TOKENS // 3, 3)) < 0.7)
    layer(x)
    expected, found = (
        tf.nest.flatten(step_of(layer, masked, jit, batch_size, noise)(x, mask))
        for jit in (False, True)
    )
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=dtype_limit)
    return found


def skewed(layer):
    """All tokens to the first two experts: by the bias, whatever they hold."""
    layer.build((None, None, D))
    bias = np.zeros(layer.num_experts)
    bias[:2] = 50.0, 49.0
    layer.gating.gate_bias.assign(bias)
    return layer


def test_a_mixture_of_a_known_batch():
    assert_same(layers.MoE(experts(), top_k()), batch_size=TOKENS // 3)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_a_mixture_of_an_unknown_batch(masked):
    assert_same(layers.MoE(experts(), top_k()), masked)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 16])
def test_nothing_is_dropped_if_all_tokens_go_to_the_same_experts(batch_size):
    gate = layers.TopKGating(k=2, use_bias=True, gate_initializer="glorot_normal")
    layer = skewed(layers.MoE(experts(activation="tanh"), gate))
    # 48 tokens; an expert of 6 has slots for 24 of them, the others spill.
    x = tf.constant(np.random.default_rng(3).normal(size=(16, 3, D)), tf.float32)
    mask = tf.ones((16, 3), tf.bool)
    expected, found = (
        tf.nest.flatten(step_of(layer, False, jit, batch_size)(x, mask))
        for jit in (False, True)
    )
    assert np.all(np.any(found[0].numpy() != 0, axis=-1))
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_noisy_gates_with_the_noise_handed_in(k):
    gate = layers.NoisyTopKGating(
        k=k,
        gate_initializer="glorot_normal",
        noise_initializer="glorot_normal",
        normalization="all",
    )
    noise = tf.constant(np.random.default_rng(1).normal(size=(TOKENS, 6)), tf.float32)
    assert_same(layers.MoE(experts(), gate), noise=noise)


OTHERS = {
    "recomputed": lambda: layers.MoE(experts(recompute=True), top_k()),
    "balanced": lambda: layers.MoE(
        experts(),
        layers.BalancedGating(k=2, gate_initializer="glorot_normal"),
        load_loss_weight=0.0,
    ),
    "list": lambda: layers.MoE(
        layers.ExpertList([keras.layers.Dense(D, "tanh") for _ in range(3)]), top_k()
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_mixtures(name, masked):
    assert_same(OTHERS[name](), masked)


@pytest.mark.slow
def test_a_hierarchical_mixture_in_evaluation():
    # Both of its gates draw noise in training.
    layer = layers.HierarchicalMoE(experts(), 3, k=(2, 1), primary_gating=top_k())
    x = tf.constant(np.random.default_rng(3).normal(size=(4, 3, D)), tf.float32)
    layer(x)
    weights = [variable.value for variable in layer.trainable_variables]

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=False)
            total = tf.reduce_sum(tf.sin(3.0 * outputs))
        return outputs, tape.gradient(
            total, [x, *weights], unconnected_gradients="zero"
        )

    expected, found = (
        tf.nest.flatten(tf.function(step, jit_compile=jit, autograph=False)(x))
        for jit in (False, True)
    )
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_recurrent_mixture():
    layer = layers.MoELSTM(3, 4, top_k(), return_sequences=True)
    assert_same(layer, batch_size=TOKENS // 3)


@pytest.mark.slow
def test_a_language_model_learns_the_same_compiled():
    tokens = np.random.default_rng(0).integers(1, 20, size=(12, 5)).astype("int32")
    losses = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        mixture = layers.MoE(experts(), top_k(), activation="sigmoid")
        model = models.MoELanguageModel(20, D, middle=mixture, dropout=0.0)
        model.compile(
            keras.optimizers.Adam(0.01),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit_compile,
        )
        fitted = model.fit(
            tokens, np.roll(tokens, -1, 1), 4, epochs=2, shuffle=False, verbose=0
        )
        losses.append(fitted.history["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert losses[0][1] < losses[0][0]


def gradients_of(layer, run, x, mask):
    """Outputs, losses and gradients of a step that is a plain graph but for `run`."""
    weights = [variable.value for variable in layer.trainable_variables]

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, 3, D)),
            tf.TensorSpec((None, 3), tf.bool),
        ],
        autograph=False,
    )
    def step(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs, losses = run(x, mask)
            total = tf.reduce_sum(tf.sin(3.0 * outputs)) + sum(losses)
        gradients = tape.gradient(total, [x, *weights], unconnected_gradients="zero")
        return outputs, losses, gradients

    return step.get_concrete_function(), tf.nest.flatten(step(x, mask))


def num_compiled(function):
    """Functions in the graph of one that only XLA can run."""
    functions = function.graph.as_graph_def().library.function
    return sum(each.attr["_XlaMustCompile"].b for each in functions)


@pytest.mark.slow
@pytest.mark.parametrize(
    "masked", [True, pytest.param(False, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("where", ["the experts", "the layer"])
def test_a_part_of_a_step_is_compiled_and_gradients_pass_through(where, masked):
    gate = layers.TopKGating(k=2, use_bias=True, gate_initializer="glorot_normal")
    layer = skewed(layers.MoE(experts(activation="tanh"), gate))
    rng = np.random.default_rng(3)
    x = tf.constant(rng.normal(size=(16, 3, D)), tf.float32)
    mask = tf.constant(rng.random((16, 3)) < 0.9)

    def plain(x, mask):
        outputs = layer(x, mask=mask if masked else None, training=True)
        return outputs, list(layer.losses)

    with serving.gpu_operations():
        function, expected = gradients_of(layer, plain, x, mask)
        assert not num_compiled(function)
        if where == "the experts":
            with serving.compiled_mixtures():
                function, found = gradients_of(layer, plain, x, mask)
        else:
            compiled = tf.function(plain, jit_compile=True, autograph=False)
            function, found = gradients_of(layer, compiled, x, mask)
    assert num_compiled(function) >= 2  # forward and backward
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_frozen_experts_are_not_compiled_by_themselves():
    layer = layers.MoE(experts(frozen_experts=(1,)), top_k())
    layer.build((None, None, D))
    x, mask = tf.ones((4, 3, D)), tf.ones((4, 3), tf.bool)
    with serving.gpu_operations(), serving.compiled_mixtures():
        function, _ = gradients_of(
            layer, lambda x, mask: (layer(x), list(layer.losses)), x, mask
        )
    assert not num_compiled(function)


def test_an_exported_model_needs_no_xla(tmp_path):
    model = keras.Sequential([keras.Input((D,)), layers.MoE(experts(), top_k())])
    x = np.random.default_rng(3).normal(size=(5, D)).astype("float32")
    with serving.gpu_operations(), serving.compiled_mixtures():
        predicted = model.predict(x, verbose=0)
        path = serving.export(model, tmp_path / "exported")
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    (outputs,) = served(tf.constant(x)).values()
    np.testing.assert_allclose(outputs, predicted, rtol=1e-5, atol=1e-6)
    assert not num_compiled(served)
