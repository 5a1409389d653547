"""Experts that are computed and trained only where they are chosen."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import layers
from keras_moe.optimizers import FactoredAdam

E, D, H, K = 300, 8, 16, 2
TOKENS, BATCH = 40, 10


def make_model(computation, mixture="flat", **options):
    keras.utils.set_random_seed(0)
    experts = layers.FeedForwardExperts(E, H, computation=computation, **options)
    if mixture == "hierarchical":
        middle = layers.HierarchicalMoE(experts, 20)
    else:
        middle = layers.MoE(experts, layers.NoisyTopKGating(k=K))
    model = keras.Sequential([keras.Input((D,)), middle, keras.layers.Dense(3)])
    return model, experts


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, D), "float32")
    return x, rng.integers(0, 3, TOKENS)


def trained(computation, optimizer, mixture="flat", **options):
    """What a model says after eight steps, and its weights."""
    model, _ = make_model(computation, mixture, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer(), loss)
    x, y = data()
    model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    return [model.predict(x, verbose=0), *model.get_weights()]


def assert_trained_alike(optimizer, mixture="flat", **options):
    found = trained("chosen", optimizer, mixture, **options)
    wanted = trained("blocks", optimizer, mixture, **options)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Without a larger epsilon, rounding is divided by rounding.
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01, epsilon=1e-3),
    "clipped by all": lambda: keras.optimizers.Adam(
        0.01, epsilon=1e-3, global_clipnorm=0.1
    ),
    "clipped": lambda: FactoredAdam(0.01, epsilon=1e-3, clipnorm=0.1),
    "decay of weights": lambda: keras.optimizers.AdamW(0.01, epsilon=1e-3),
    "accumulated": lambda: keras.optimizers.Adam(
        0.01, epsilon=1e-3, gradient_accumulation_steps=2
    ),
    "averages": lambda: keras.optimizers.Adam(0.01, epsilon=1e-3, use_ema=True),
    "scaled loss": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01, epsilon=1e-3)
    ),
    "factored": lambda: FactoredAdam(0.01, epsilon=1e-3),
    "factored, caught up": lambda: FactoredAdam(
        0.01, epsilon=1e-3, untouched_rows="catch_up"
    ),
    "factored, none": lambda: FactoredAdam(0.01, epsilon=1e-3, factored=[]),
    "factored, accumulated": lambda: FactoredAdam(
        0.01, epsilon=1e-3, gradient_accumulation_steps=2
    ),
    "factored, in the backward pass": lambda: FactoredAdam(
        0.01, epsilon=1e-3, update_in_backward=True
    ),
}


# The others differ in what Keras does with any sparse gradient.
USUAL = ["sgd", "adam", "clipped", "scaled loss", "factored", "factored, caught up"]
USUAL += ["factored, in the backward pass"]


@pytest.mark.filterwarnings("ignore:`update_in_backward` had no effect")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=() if name in USUAL else (pytest.mark.slow, pytest.mark.exhaustive),
        )
        for name in OPTIMIZERS
    ],
)
def test_training_is_that_of_all_experts(name):
    # What has caught up differs by what a bias has not read since: see `FactoredAdam`.
    options = {"use_bias": True} if name != "factored, caught up" else {}
    assert_trained_alike(OPTIMIZERS[name], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_regularizer": "l2"},
        {"kernel_constraint": "max_norm"},
        {"frozen_experts": (0, 5)},
        {"dtype": "mixed_bfloat16"},
        {"recompute": True},
        {"lora_rank": 2},
        {"dropout": 0.5},
        {"mixture": "hierarchical"},
    ],
    ids=str,
)
def test_rules_and_types_are_those_of_all_experts(options):
    assert_trained_alike(OPTIMIZERS["adam"], **options)


def gradients(model, x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True) ** 2)
    return tape.gradient(loss, model.trainable_variables)


@pytest.mark.parametrize("wrap", [lambda step: step, tf.function])
def test_gradients_are_those_of_the_experts_that_have_rows(wrap):
    model, experts = make_model("chosen", use_bias=True)
    plan = F.make_dispatch_plan(tf.constant([[7, 2], [2, 299], [7, 2]]), E)
    x = tf.constant(data()[0][:3])

    @wrap
    def step():
        with tf.GradientTape() as tape:
            y = experts(x, gates=tf.ones((3, 2)), plan=plan)
            loss = tf.reduce_sum(y**2)
        found = tape.gradient(loss, experts.trainable_variables)
        assert all(isinstance(each, tf.IndexedSlices) for each in found)
        return [(each.indices, each.values) for each in found]

    for (indices, values), weight in zip(
        step(), experts.trainable_variables, strict=True
    ):
        np.testing.assert_array_equal(indices, [2, 7, 299])
        assert values.shape == (3, *weight.shape[1:])
        assert np.all(np.any(values.numpy().reshape(3, -1), axis=1))


@pytest.mark.parametrize("name", ["sgd", "factored"])
def test_a_step_touches_nothing_of_the_size_of_all_experts(name):
    """Not even the copy that reading a variable is after some of its rows were written."""

    def large(computation):
        model, experts = make_model(computation)
        optimizer = OPTIMIZERS[name]()
        optimizer.build(model.trainable_variables)

        @tf.function
        def step(x):
            optimizer.apply(gradients(model, x), model.trainable_variables)

        concrete = step.get_concrete_function(tf.constant(data()[0][:BATCH]))
        size = experts.kernels[0].shape.num_elements()
        found = []
        for op in concrete.graph.get_operations():
            sizes = [t.shape.num_elements() or 0 for t in op.outputs]
            # A read that nobody takes is not run.
            is_used = any(t.consumers() for t in op.outputs)
            if max(sizes, default=0) >= size and is_used:
                found.append(op.type)
        return found

    assert large("chosen") == []
    assert large("blocks")  # so the test sees them


def test_an_expert_that_is_used_by_two_calls_gets_both_gradients():
    x = tf.constant(data()[0][:2])
    plans = [F.make_dispatch_plan(tf.constant(i), E) for i in ([[7], [2]], [[2], [9]])]

    def change(computation):
        _, experts = make_model(computation)
        kernel = experts.kernels[0]
        start, optimizer = kernel.numpy(), FactoredAdam(0.1)
        with tf.GradientTape() as tape:
            ys = [experts(x, gates=tf.ones((2, 1)), plan=plan) for plan in plans]
            loss = tf.reduce_sum(tf.add_n(ys) ** 2)
        optimizer.apply(tape.gradient(loss, [kernel]), [kernel])
        return kernel.numpy() - start

    found = change("chosen")
    touched = np.flatnonzero(np.any(found.reshape(E, -1), axis=1))
    np.testing.assert_array_equal(touched, [2, 7, 9])
    np.testing.assert_allclose(found, change("blocks"), rtol=1e-4, atol=1e-7)


def test_other_values_for_the_weights_are_taken():
    """`stateless_call` hands a model the values to compute with."""
    model, _ = make_model("chosen")
    x = data()[0]
    doubled = [2 * v.numpy() for v in model.trainable_variables]
    others = [v.numpy() for v in model.non_trainable_variables]
    found, _ = model.stateless_call(doubled, others, x)
    before = model(x)
    for variable, value in zip(model.trainable_variables, doubled, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(found, model(x), rtol=1e-6)
    assert np.max(np.abs(found - before)) > 1e-3


class Cell(keras.layers.Layer):
    """A recurrent cell whose step is a mixture."""

    def __init__(self, computation):
        super().__init__()
        experts = layers.FeedForwardExperts(E, H, computation=computation)
        no_loss = {"importance_loss_weight": 0.0, "load_loss_weight": 0.0}
        self.moe = layers.MoE(experts, layers.TopKGating(k=K), **no_loss)
        self.state_size = self.output_size = D

    def build(self, input_shape):
        self.moe.build(input_shape)

    def call(self, inputs, states):
        y = self.moe(inputs + states[0])
        return y, [y]


def test_within_a_loop():
    def train(computation):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6, D))
        rnn = keras.layers.RNN(Cell(computation))
        model = keras.Model(inputs, keras.layers.Dense(1)(rnn(inputs)))
        model.compile(OPTIMIZERS["adam"](), "mse")
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal((20, 6, D), "float32"), rng.standard_normal((20, 1))
        model.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    for a, b in zip(train("chosen"), train("blocks"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_files_and_exports(tmp_path):
    model, _ = make_model("chosen")
    x = data()[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].experts.computation == "chosen"
    np.testing.assert_array_equal(loaded(x), model(x))
    model.export(tmp_path / "export", verbose=False)
    artifact = tf.saved_model.load(tmp_path / "export")
    np.testing.assert_allclose(artifact.serve(x), model(x), rtol=1e-6)


def test_compiled_by_xla_it_is_as_without():
    model, _ = make_model("chosen")
    x = tf.constant(data()[0])
    compiled = tf.function(model, jit_compile=True)
    np.testing.assert_allclose(compiled(x), model(x), rtol=1e-4, atol=1e-5)
