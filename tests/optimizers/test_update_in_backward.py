"""Steps of experts in the backward pass give the weights of ordinary steps."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe
from keras_moe import layers
from keras_moe.optimizers import FactoredAdam, factors

STEPS = 10


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(factors, "_BLOCK_BYTES", 2 * 4 * 4 * 8)  # two experts of 4 x 8


def batches(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(STEPS, 12, 4)).astype("float32")


def mixture(kind="flat", experts=layers.FeedForwardExperts, num_experts=7, **options):
    own = experts(num_experts, hidden_units=8, **options)
    if kind == "hierarchical":
        return layers.HierarchicalMoE(own, 2, k=(2, 2), noise_stddev=0.0)
    return layers.MoE(own, layers.NoisyTopKGating(2, seed=1))


def make_model(layer, optimizer):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(4, activation="tanh")(inputs)
    model = keras.Model(inputs, layer(hidden))
    kernel = getattr(layer.gating, "gate_kernel", None)
    if kernel is not None:
        kernel.assign(np.random.default_rng(5).normal(size=kernel.shape))
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def trained(update_in_backward, make=mixture, train=None, **options):
    options = {"learning_rate": 0.01, "beta_2": 0.9} | options
    optimizer = FactoredAdam(**options, update_in_backward=update_in_backward)
    keras.utils.set_random_seed(3)
    model = make_model(make(), optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (train or fit)(model)
    told = [str(w.message) for w in caught if "update_in_backward" in str(w.message)]
    return model, told


def fit(model):
    data = np.concatenate(batches())
    model.fit(data, data, batch_size=12, epochs=1, shuffle=False, verbose=0)


def assert_equal(first, second, tolerance=1e-6):
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(first.optimizer.variables, second.optimizer.variables, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def spy(monkeypatch):
    """Counts the blocks that are updated in backward passes."""
    found = []
    plain = keras_moe.optimizers.backward.BackwardUpdate._update

    def update(self, part, gradient):
        found.append((self._variable.path, part))
        return plain(self, part, gradient)

    monkeypatch.setattr(keras_moe.optimizers.backward.BackwardUpdate, "_update", update)
    return found


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mixture, {}),
        (lambda: mixture(experts=layers.GatedExperts, use_bias=True), {}),
        (lambda: mixture("hierarchical", num_experts=8), {}),
        (
            mixture,
            {
                "weight_decay": 0.1,
                "clipvalue": 0.01,
                "learning_rate_factors": {"kernel_0": 0.5},
            },
        ),
    ],
    ids=["flat", "gated", "hierarchical", "decay"],
)
def test_weights_and_state_are_those_of_ordinary_steps(make, options, monkeypatch):
    blocks = spy(monkeypatch)
    plain, _ = trained(False, make, **options)
    assert not blocks
    early, told = trained(True, make, **options)
    assert not told
    kernels = {v.path for v in early.trainable_variables if is_kernel(v)}
    assert {path for path, _ in blocks} == kernels
    assert len(set(blocks_of(blocks))) == 4 * len(kernels)  # two experts at a time
    assert_equal(plain, early)


def blocks_of(blocks):
    return [(path, part.start) for path, part in blocks]


def is_kernel(variable):
    return getattr(variable, "is_expert_weight", False)


@pytest.mark.slow
def test_experts_without_tokens_decay_their_averages(monkeypatch):
    """After the first step all tokens go elsewhere."""
    blocks = spy(monkeypatch)
    found = []
    for early in (False, True):
        model, _ = trained(early)
        gate = model.layers[-1].gating
        gate.gate_kernel.assign(np.zeros(gate.gate_kernel.shape))
        gate.noise_kernel.assign(np.full(gate.noise_kernel.shape, 0.0))
        rows = model.optimizer.slots_of(model.layers[-1].experts.kernels[0])[0]
        before = rows.numpy()
        data = np.zeros((12, 4), "float32")
        model.train_on_batch(data, data)
        found.append((before, rows.numpy()))
    (before, after), (early_before, early_after) = found
    assert blocks
    np.testing.assert_allclose(early_before, before, rtol=1e-6)
    np.testing.assert_allclose(early_after, after, rtol=1e-6)
    idle = np.isclose(after, 0.9 * before, rtol=1e-6).all(axis=1)
    assert idle.any()
    assert before[idle].any()


def own_loop(model, announce=True):
    optimizer = model.optimizer

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            outputs = tf.cast(model(x, training=True), x.dtype)
            loss = tf.reduce_mean(tf.square(outputs - x))
            loss += sum(model.losses)
            if announce:
                loss = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    for x in batches()[:3]:
        step(tf.constant(x))


def test_loops_of_ones_own_announce_the_step(monkeypatch):
    blocks = spy(monkeypatch)
    plain, _ = trained(False, train=own_loop)
    early, told = trained(True, train=own_loop)
    assert blocks
    assert not told
    assert_equal(plain, early)


class Twice(keras.layers.Layer):
    """Runs a mixture twice."""

    def __init__(self):
        super().__init__()
        self.mixture = mixture(num_experts=4)
        self.gating = self.mixture.gating

    def build(self, input_shape):
        self.mixture.build(input_shape)

    def call(self, x, training=None):
        return self.mixture(self.mixture(x, training=training), training=training)


def regularized():
    return mixture(num_experts=4, kernel_regularizer="l2")


def frozen():
    return mixture(num_experts=4, frozen_experts=[1])


def in_blocks():
    return mixture(num_experts=4, computation="blocks")


def recomputed():
    return mixture(num_experts=4, recompute=True)


def unannounced(model):
    own_loop(model, announce=False)


def eager(model):
    model.run_eagerly = True
    model.train_on_batch(*[batches()[0]] * 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "train", "message"),
    [
        (Twice, own_loop, "used twice"),
        (regularized, own_loop, "rules"),
        (frozen, own_loop, "frozen"),
        (in_blocks, own_loop, "256"),
        (recomputed, own_loop, "recompute"),
        (mixture, unannounced, "scale_loss"),
        (mixture, eager, "eager"),
    ],
)
def test_elsewhere_the_step_is_the_ordinary_one(make, train, message, monkeypatch):
    blocks = spy(monkeypatch)
    plain, _ = trained(False, make, train)
    early, told = trained(True, make, train)
    assert not blocks
    assert len(told) == 1
    assert message in told[0]
    assert "kernel_0" in told[0]
    assert_equal(plain, early)


def test_a_weight_that_is_read_beside_its_layer_is_refused():
    def train(model):
        kernel = model.layers[-1].experts.kernels[0]

        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x, training=True)) + tf.reduce_sum(kernel)
                loss = model.optimizer.scale_loss(loss)
            variables = model.trainable_variables
            model.optimizer.apply(tape.gradient(loss, variables), variables)

        step(tf.constant(batches()[0]))

    with pytest.raises(ValueError, match="further gradient for .*kernel_0"):
        trained(True, train=train)


def test_a_second_backward_pass_and_missing_variables_are_refused():
    def gradients_of(model, persistent):
        with tf.GradientTape(persistent=persistent) as tape:
            loss = tf.reduce_sum(model(batches()[0], training=True))
            loss = model.optimizer.scale_loss(loss)
        return loss, tape

    def twice(model):
        @tf.function
        def step():
            loss, tape = gradients_of(model, True)
            tape.gradient(loss, model.trainable_variables)
            tape.gradient(loss, model.trainable_variables)

        step()

    with pytest.raises(ValueError, match="second backward pass through"):
        trained(True, train=twice)

    def without_experts(model):
        @tf.function
        def step():
            loss, tape = gradients_of(model, False)
            gates = model.layers[-1].gating.trainable_variables
            model.optimizer.apply(tape.gradient(loss, gates), gates)

        step()

    with pytest.raises(ValueError, match="`variables` must have .*kernel"):
        trained(True, train=without_experts)


@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 1.0},
        {"global_clipnorm": 1.0},
        {"use_ema": True},
        {"gradient_accumulation_steps": 2},
        {"loss_scale_factor": 8.0},
    ],
)
def test_options_that_need_whole_gradients_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be left out"):
        FactoredAdam(update_in_backward=True, **options)


@pytest.mark.slow
def test_training_goes_on_from_a_file(tmp_path, monkeypatch):
    def without_noise():  # Keras does not save where its generators are
        experts = layers.FeedForwardExperts(7, hidden_units=8)
        return layers.MoE(experts, layers.NoisyTopKGating(2, noise_stddev=0.0))

    early, _ = trained(True, without_noise, train=own_loop)
    early.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.update_in_backward
    blocks = spy(monkeypatch)
    for model in (early, loaded):
        fit(model)
    assert blocks
    assert_equal(early, loaded)


@pytest.mark.slow
def test_bfloat16_products_update_weights_of_float32(monkeypatch):
    blocks = spy(monkeypatch)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        plain, _ = trained(False, train=own_loop)
        early, told = trained(True, train=own_loop)
    finally:
        keras.config.set_dtype_policy("float32")
    assert blocks
    assert not told
    assert_equal(plain, early, tolerance=1e-3)


def test_a_scaled_loss_falls_back_with_a_warning(monkeypatch):
    blocks = spy(monkeypatch)
    inner = FactoredAdam(0.01, update_in_backward=True)
    model = make_model(mixture(), keras.optimizers.LossScaleOptimizer(inner))
    with pytest.warns(UserWarning, match="LossScaleOptimizer"):
        model.train_on_batch(*[batches()[0]] * 2)
    assert not blocks
