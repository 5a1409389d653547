"""The bias that balances: that of a simulation, after every kind of step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers
from tests.oracles import routers as oracle

D, E, K, RATE = 5, 6, 2, 0.01


def mixture(**options):
    gate = layers.LossFreeGating(K, bias_update_rate=RATE, **options)
    return layers.MoE(layers.FeedForwardExperts(E, 4), gate, name="moe")


def compiled(accumulated=None, optimizer=None, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((None, D)), mixture()])
    optimizer = optimizer or keras.optimizers.SGD(
        0.2, gradient_accumulation_steps=accumulated
    )
    model.compile(optimizer, "mse", **options)
    return model


def batches(number, time=9):
    rng = np.random.default_rng(1)
    x = rng.normal(loc=0.5, size=(2 * number, time, D)).astype("float32")
    return x, np.sin(3 * x)


def gate_of(model):
    return model.get_layer("moe").gating


class Kernels(keras.callbacks.Callback):
    """The gate kernel before every batch."""

    def on_train_begin(self, logs=None):
        self.before = []

    def on_train_batch_begin(self, batch, logs=None):
        self.before.append(gate_of(self.model).gate_kernel.numpy().astype("float64"))


def simulated(x, kernels, accumulated=1, bias=None, mask=None):
    """The bias after all batches, and that of the step at the end."""
    bias = np.zeros(E) if bias is None else bias
    counts = np.zeros(E)
    for i, kernel in enumerate(kernels):
        rows = x[2 * i : 2 * i + 2]
        tokens = rows[mask[2 * i : 2 * i + 2]] if mask is not None else rows
        logits = tokens.reshape(-1, D) @ kernel
        for experts in oracle.biased_choice(logits, bias, K):
            counts[experts] += 1
        if (i + 1) % accumulated == 0:
            bias, counts = oracle.balanced_bias(bias, counts, RATE), np.zeros(E)
    return bias


def fitted(model, x, y, **options):
    kernels = Kernels()
    model.fit(
        x, y, batch_size=2, verbose=0, shuffle=False, callbacks=[kernels], **options
    )
    return kernels.before


@pytest.mark.parametrize("accumulated", [None, 2, 3])
def test_in_fit_the_bias_is_that_of_a_simulation(accumulated):
    x, y = batches(6)
    model = compiled(accumulated)
    kernels = fitted(model, x, y)
    expected = simulated(x, kernels, accumulated or 1)
    assert len(set(np.round(expected, 6))) > 2  # of several steps
    np.testing.assert_allclose(gate_of(model).selection_bias, expected, atol=1e-6)


def test_after_an_epoch_whose_last_step_is_not_complete_it_goes_on():
    # 5 batches of 3 a step: the second step has two in this epoch, one in the next.
    x, y = batches(5)
    model = compiled(3)
    kernels = fitted(model, x, y, epochs=2)
    expected = simulated(np.concatenate([x, x])[: 2 * 9], kernels[:9], 3)
    gate = gate_of(model)
    np.testing.assert_allclose(gate.step_bias, expected, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_execution": 3},
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_however_steps_are_run_the_bias_is_the_same(options):
    x, y = batches(6)
    biases = []
    for each in ({}, options):
        model = compiled(**each)
        fitted(model, x, y)
        biases.append(gate_of(model).selection_bias.numpy())
    assert len(set(np.round(biases[0], 6))) > 2
    np.testing.assert_allclose(*biases, atol=1e-6)


def test_masked_tokens_are_in_no_count():
    x, y = batches(4)
    mask = np.arange(9) < np.random.default_rng(2).integers(2, 9, size=(8, 1))
    x[~mask] = 0.0
    model = compiled()
    masked = keras.Sequential(
        [keras.Input((None, D)), keras.layers.Masking(), model.get_layer("moe")]
    )
    masked.compile(keras.optimizers.SGD(0.2), "mse")
    kernels = fitted(masked, x, y)
    expected = simulated(x, kernels, mask=mask)
    np.testing.assert_allclose(gate_of(masked).selection_bias, expected, atol=1e-6)


@pytest.mark.parametrize(
    "form", ["model.keras", pytest.param("checkpoint", marks=pytest.mark.slow)]
)
def test_after_reloading_it_goes_on_exactly(form, tmp_path):
    # In the middle of a step of two batches.
    x, y = batches(8)
    cut = 2 * 5
    model = compiled(2)
    fitted(model, x[:cut], y[:cut])
    if form == "checkpoint":
        saved = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        path = saved.write(str(tmp_path / form))
        again = compiled(2)
        again.optimizer.build(again.trainable_variables)
        tf.train.Checkpoint(model=again, optimizer=again.optimizer).read(path)
    else:
        model.save(tmp_path / form)
        again = keras.saving.load_model(tmp_path / form)
    for each in (model, again):
        fitted(each, x[cut:], y[cut:])
    assert np.abs(gate_of(model).selection_bias).max() > 0
    for a, b in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.path)


@pytest.mark.parametrize("frozen", ["evaluation", "trainable"])
def test_evaluation_and_a_frozen_gate_leave_the_state(frozen):
    x, y = batches(3)
    model = compiled()
    fitted(model, x, y)
    gate = gate_of(model)
    before = [v.numpy() for v in gate.non_trainable_variables]
    assert np.abs(before[0]).max() > 0
    if frozen == "trainable":
        gate.trainable = False
        model.compile("sgd", "mse")
        model.fit(x, y, batch_size=2, verbose=0)
        before = [gate.gate_kernel.numpy(), *before]
    else:
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
    for value, variable in zip(before, gate.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(value, variable)


def test_evaluation_chooses_by_the_bias_of_the_next_step(rng):
    layer = mixture()
    x = rng.normal(size=(8, D)).astype("float32")
    layer(x)
    gate = layer.gating
    gate.selection_bias.assign([0.0, 0.0, 9.0, 0.0, 8.0, 0.0])
    assert layer.route(x).expert_indices.numpy().tolist() == [[2, 4]] * 8
    # A bias set by hand is that of the first step, too.
    assert layer.route(x, training=True).expert_indices.numpy().tolist() == [[2, 4]] * 8


def test_a_shared_gate_counts_all_of_its_mixtures(rng):
    gate = layers.LossFreeGating(1, E, bias_update_rate=RATE, normalization="none")
    x = [rng.normal(size=(7, D)).astype("float32") for _ in range(2)]
    mixtures = [layers.MoE(layers.FeedForwardExperts(E, 4), gate) for _ in x]
    counts = 0
    for layer, rows in zip(mixtures, x, strict=True):
        layer(rows, training=True)
        counts = counts + layer.balance.counts().numpy()
    expected = oracle.balanced_bias(np.zeros(E), counts, RATE)
    np.testing.assert_allclose(gate.selection_bias, expected, atol=1e-7)


def test_it_balances_what_a_gate_without_bias_does_not(rng):
    # The experts are as they are; tokens lean to some of them.
    gates = {
        rate: layers.LossFreeGating(K, E, bias_update_rate=rate) for rate in (0.0, 0.02)
    }
    x = rng.normal(loc=1.0, size=(600, D)).astype("float32")
    worst = {}
    for rate, gate in gates.items():
        gate.build((None, D))
        gate.gate_kernel.assign(np.random.default_rng(3).normal(size=(D, E)))
        for step in range(60):
            result = gate(x, training=True)
            gate.gate_kernel.assign(gate.gate_kernel * (1 + 1e-6 * (-1) ** step))
        counts = result.statistics.counts.numpy()
        worst[rate] = counts.max() / counts.mean()
    assert worst[0.0] > 2.0
    assert worst[0.02] < 1.2  # every step moves every bias


def test_no_loss_is_added_unless_it_is_asked_for(rng):
    x = rng.normal(size=(6, D)).astype("float32")
    layer = mixture()
    layer(x, training=True)
    assert layer.losses == []
    copy = layers.MoE.from_config(layer.get_config())
    assert copy.importance_loss_weight == copy.load_loss_weight == 0.0
    asked = layers.MoE(
        layers.FeedForwardExperts(E, 4),
        layers.LossFreeGating(K),
        importance_loss_weight=0.1,
    )
    asked(x, training=True)
    assert len(asked.losses) == 1
    again = layers.MoE.from_config(asked.get_config())
    assert again.importance_loss_weight == 0.1


def test_recurrent_mixtures_move_the_bias_by_all_time_steps(rng):
    gate = layers.LossFreeGating(K, bias_update_rate=RATE)
    layer = layers.MoELSTM(4, E, gate, return_sequences=True)
    x = rng.normal(size=(3, 5, D)).astype("float32")
    step = tf.function(lambda: layer(x, training=True))
    step()
    assert layer.losses == []
    counts = layer.balance.counts().numpy()
    assert counts.sum() == 3 * 5 * K
    np.testing.assert_array_equal(gate.step_counts, counts)
    expected = oracle.balanced_bias(np.zeros(E), counts, RATE)
    np.testing.assert_allclose(gate.selection_bias, expected, atol=1e-7)
    gate.gate_kernel.assign(2.0 * gate.gate_kernel)
    step()
    np.testing.assert_allclose(gate.step_bias, expected, atol=1e-7)


def test_as_the_primary_gate_it_balances_the_groups(rng):
    gate = layers.LossFreeGating(1, bias_update_rate=RATE, normalization="none")
    layer = layers.HierarchicalMoE(
        layers.FeedForwardExperts(8, 4), 4, primary_gating=gate, k=(1, 2)
    )
    layer(rng.normal(size=(10, D)).astype("float32"), training=True)
    # Two experts of each group take its tokens.
    counts = layer.balance.counts().numpy().reshape(4, 2).sum(axis=1) / 2
    np.testing.assert_array_equal(gate.step_counts, counts)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_is_gated_in_float32(rng, policy):
    gate = layers.LossFreeGating(K, E, dtype=policy)
    result = gate(rng.normal(size=(6, D)).astype("float16"), training=True)
    assert result.gates.dtype == tf.float32
    assert gate.selection_bias.dtype == "float32"


def test_scaling_and_normalization_of_the_gates(rng):
    x = rng.normal(size=(6, D)).astype("float32")
    for normalization in ("selected", "none"):
        gate = layers.LossFreeGating(
            K, E, scaling_factor=2.5, normalization=normalization
        )
        result = gate(x)
        dense = np.zeros((6, E))
        np.put_along_axis(dense, result.expert_indices.numpy(), result.gates, axis=1)
        logits = (x @ gate.gate_kernel.numpy()).astype("float64")
        expected = 2.5 * oracle.biased_gates(
            logits, np.zeros(E), K, normalization=normalization
        )
        np.testing.assert_allclose(dense, expected, rtol=1e-5)


def test_one_expert_a_token_whose_gate_is_constant_is_warned_of():
    experts = layers.FeedForwardExperts(E, 4)
    with pytest.warns(UserWarning, match='normalization="none"'):
        layers.MoE(experts, layers.LossFreeGating(1))


def test_what_cannot_be_is_refused():
    for options, message in (
        ({"scores": "relu"}, "scores='relu'"),
        ({"normalization": "all"}, "normalization='all'"),
        ({"bias_update_rate": -0.1}, "bias_update_rate=-0.1"),
        ({"scaling_factor": 0.0}, "scaling_factor=0.0"),
        ({"num_groups": 5}, "num_groups=5, num_experts=8"),
        ({"num_groups": 4, "k": 3}, "num_kept_groups=1, num_groups=4"),
        ({"k": 9}, "k=9, num_experts=8"),
    ):
        with pytest.raises(ValueError, match=message):
            layers.LossFreeGating(num_experts=8, **{"k": 2, **options})
    with pytest.raises(ValueError, match="num_groups=4, num_experts=6"):
        layers.MoE(
            layers.FeedForwardExperts(6, 4), layers.LossFreeGating(2, num_groups=4)
        ).build((None, D))


def test_a_look_at_the_routing_of_training_leaves_no_trace():
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 10)
    for gate in (
        layers.LossFreeGating(2, bias_update_rate=0.1),
        layers.NoisyTopKGating(2, noise_stddev=schedule),
    ):
        moe = layers.MoE(layers.FeedForwardExperts(8, 4), gate)
        x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
        moe(x, training=True)
        before = [v.numpy() for v in gate.weights if "seed" not in v.path]
        moe.route(x, training=True)
        tf.function(lambda: moe.route(x, training=True))()  # noqa: B023
        after = [v.numpy() for v in gate.weights if "seed" not in v.path]
        for a, b in zip(after, before, strict=True):
            np.testing.assert_array_equal(a, b)
