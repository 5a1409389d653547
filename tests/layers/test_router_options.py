"""What gates take besides the paper: later losses, jitter, scaling, noise of the user's."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe
from keras_moe import functional as F
from keras_moe import layers, serving
from keras_moe.layers.base_gating import _Gating
from tests.oracles import mixture as oracle

D, E, K = 6, 8, 2
SCHEDULE = keras.optimizers.schedules.PolynomialDecay(1.0, 4, 0.2)
NO_LOSSES = {"importance_loss_weight": 0.0, "load_loss_weight": 0.0}


def tokens(rng, number=20):
    return rng.normal(size=(number, D)).astype("float32")


def logits_of(gate, x):
    return x.astype("float64") @ gate.gate_kernel.numpy().astype("float64")


def make(kind, **options):
    arguments = {"HierarchicalGating": (4, (2, 1))}.get(kind.__name__, ())
    gate = kind(*arguments, num_experts=E, gate_initializer="normal", **options)
    gate.build((None, D))
    return gate


GATES = [
    value
    for name in layers.__all__
    if isinstance(value := getattr(layers, name), type) and issubclass(value, _Gating)
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", GATES, ids=lambda kind: kind.__name__)
def test_every_gate_has_a_router_z_loss_in_training(kind, masked, rng):
    x = tokens(rng)
    mask = (np.arange(len(x)) % 3 > 0) if masked else np.ones(len(x), bool)
    options = {"mask": mask} if masked else {}
    keras.utils.set_random_seed(1)
    gate, plain = make(kind, z_loss_weight=0.5), make(kind)
    losses, others = (
        each(x, training=True, **options).auxiliary_losses for each in (gate, plain)
    )
    levels = 1 + (kind is layers.HierarchicalGating)
    assert len(losses) == len(others) + levels
    assert gate(x, training=False, **options).auxiliary_losses == ()
    if levels == 1:  # the two are below
        wanted = 0.5 * oracle.router_z_loss(logits_of(gate, x)[mask])
        # The jitter of Switch moves its logits by a hundredth.
        apart = [abs(float(each) / wanted - 1.0) for each in losses]
        assert min(apart) < (0.02 if kind is layers.SwitchGating else 1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["here", "gpu"])
def test_both_levels_have_a_router_z_loss(where, masked, rng):
    x = tokens(rng)
    mask = tf.constant(np.arange(len(x)) % 3 > 0) if masked else None
    gate = make(layers.HierarchicalGating, z_loss_weight=0.5, noise_stddev=0.0)
    primary = gate.primary_gating
    primary.gate_kernel.assign(rng.normal(size=primary.gate_kernel.shape))
    if where == "gpu":
        with serving.gpu_operations():
            run = tf.function(lambda x: gate(x, mask=mask, training=True))
            losses = run(x).auxiliary_losses
    else:
        losses = gate(x, mask=mask, training=True).auxiliary_losses
    clean, kernels = logits_of(primary, x), gate.gate_kernel.numpy()
    own = [  # of each real token the logits in its two groups
        x[n].astype("float64") @ kernels[group]
        for n in range(len(x))
        if not masked or n % 3 > 0
        for group in oracle.top_k(clean[n], 2)
    ]
    real = clean if mask is None else clean[mask.numpy()]
    wanted = [0.5 * oracle.router_z_loss(each) for each in (real, own)]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def test_switch_loss_takes_counts_with_noise_and_probabilities_without(rng):
    x, mask = tokens(rng), np.arange(20) % 4 > 0
    gate = make(layers.NoisyTopKGating, k=K, switch_loss_weight=0.3)
    gate.noise_kernel.assign(rng.normal(size=(D, E)))
    result = gate(x, mask=mask, training=True)
    (loss,) = result.auxiliary_losses
    probabilities = np.array([oracle.softmax(row) for row in logits_of(gate, x)[mask]])
    counts = np.bincount(result.expert_indices.numpy()[mask].ravel(), minlength=E)
    assert np.any(counts != gate(x, mask=mask).statistics.counts)
    wanted = 0.3 * oracle.switch_loss(probabilities, counts)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    with tf.GradientTape() as tape:
        (loss,) = gate(x, training=True).auxiliary_losses
    assert np.abs(tape.gradient(loss, gate.gate_kernel.value)).max() > 0


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_losses_of_gates_are_those_of_the_mixture_in_training(form, rng):
    x = tokens(rng)
    gate = layers.TopKGating(K, z_loss_weight=0.5, switch_loss_weight=0.3)
    moe = layers.MoE(layers.FeedForwardExperts(E, 4), gate, **NO_LOSSES)
    moe(x)
    assert moe.losses == []

    def losses(x):
        moe(x, training=True)
        return moe.losses

    found = losses(x) if form == "eager" else tf.function(losses, jit_compile=True)(x)
    logits = logits_of(gate, x)
    chosen = [oracle.top_k(row, K) for row in logits]
    counts = np.bincount(np.ravel(chosen), minlength=E)
    probabilities = np.array([oracle.softmax(row) for row in logits])
    wanted = [
        0.5 * oracle.router_z_loss(logits),
        0.3 * oracle.switch_loss(probabilities, counts),
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_switch_gate_is_a_top_k_gate_of_probabilities(rng):
    x = tokens(rng)
    switch, plain = layers.SwitchGating(E), layers.TopKGating(1, E, normalization="all")
    switch(x), plain(x)
    plain.gate_kernel.assign(switch.gate_kernel)
    np.testing.assert_array_equal(switch(x).gates, plain(x).gates)
    np.testing.assert_array_equal(switch(x).expert_indices, plain(x).expert_indices)
    assert (switch.k, switch.switch_loss_weight, switch.input_jitter) == (1, 0.01, 0.01)
    assert k_and_normalization(switch.get_config()) == set()


def k_and_normalization(config):
    return {"k", "normalization"} & set(config)


@pytest.mark.parametrize("kind", [layers.TopKGating, layers.NoisyTopKGating])
def test_jitter_is_seen_by_the_gate_alone_and_in_training_alone(kind, rng):
    x = np.ones((500, D), "float32")
    options = {"k": E, "normalization": "all", "input_jitter": 0.25, "seed": 3}
    if kind is layers.NoisyTopKGating:
        options["noise_stddev"] = 0.0
    gate = make(kind, **options)
    gate.gate_kernel.assign(np.eye(D, E) * 2.0)
    result = gate(x, training=True)
    # Gates are e^logit / sum: the logits of two experts differ by that of their gates.
    order = np.argsort(result.expert_indices.numpy(), axis=1)
    logits = np.log(np.take_along_axis(result.gates.numpy(), order, axis=1))
    factors = (logits - logits[:, -1:])[:, :D] / 2.0  # those of the last are 0
    assert 0.75 - 1e-5 <= factors.min() < 0.76
    assert 1.24 < factors.max() <= 1.25 + 1e-5
    # Uniform over a width of 0.5: standard deviation 0.5 / sqrt(12).
    assert factors.std() == pytest.approx(0.5 / 12**0.5, rel=0.05)
    assert np.abs(np.corrcoef(factors.T) - np.eye(D)).max() < 0.25
    # Kernels of some processors round the last rows otherwise than the first.
    assert np.ptp(gate(x, training=False).gates, axis=0).max() < 1e-6
    # Another call, other numbers; the same seed, the same.
    again = make(kind, **options)
    again.gate_kernel.assign(gate.gate_kernel)
    np.testing.assert_array_equal(again(x, training=True).gates, result.gates)
    assert np.any(again(x, training=True).gates != result.gates)
    # Experts that return what they get show what they get.
    moe = layers.MoE(layers.ExpertList([keras.layers.Identity()] * 1), None)
    np.testing.assert_allclose(moe(x, training=True), x, rtol=1e-6)


def test_scaled_gates(rng):
    x = tokens(rng)
    plain = make(layers.TopKGating, k=K)
    scaled = make(layers.TopKGating, k=K, scaling_factor=2.5)
    scaled.gate_kernel.assign(plain.gate_kernel)
    np.testing.assert_allclose(scaled(x).gates, 2.5 * plain(x).gates, rtol=1e-6)
    entropies = []
    for gate in (plain, scaled):
        moe = layers.MoE(layers.FeedForwardExperts(E, 4), gate)
        model = keras.Sequential([keras.Input((D,)), moe])
        model.compile("sgd", "mse")
        usage = keras_moe.telemetry.ExpertUsage()
        model.evaluate(x, x, verbose=0, callbacks=[usage])
        (record,) = usage.records[moe.name]["validation"]
        entropies.append(record.figures["gate_entropy"])
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)


# Noise that the user controls.


@pytest.mark.parametrize("noise_stddev", [0.7, SCHEDULE])
def test_fixed_noise_and_its_load_equal_the_oracle(noise_stddev, rng):
    x, noise = tokens(rng), rng.normal(size=(20, E)).astype("float32")
    gate = make(layers.NoisyTopKGating, k=K, noise_stddev=noise_stddev)
    assert not hasattr(gate, "noise_kernel")
    stddev = 0.7 if noise_stddev == 0.7 else 1.0  # a schedule begins at its first value
    result = gate(x, training=True, noise=noise)
    clean = logits_of(gate, x)
    noisy = clean + stddev * noise
    for n, row in enumerate(noisy):
        assert result.expert_indices[n].numpy().tolist() == oracle.top_k(row, K)
    wanted = oracle.prob_in_top_k(clean, noisy, np.full_like(clean, stddev), K)
    np.testing.assert_allclose(result.statistics.load, wanted.sum(axis=0), rtol=1e-4)
    kept = oracle.choices_kept(clean, result.expert_indices.numpy().tolist())
    np.testing.assert_allclose(result.choices_kept, [sum(kept), 20], rtol=1e-6)
    assert gate(x).choices_kept == ()
    np.testing.assert_allclose(gate.noise_stddev_of(x), np.full((20, E), stddev))


def test_little_noise_has_the_load_of_the_least_deviation(rng):
    x, noise = tokens(rng), rng.normal(size=(20, E)).astype("float32")
    options = {"k": K, "noise_stddev": 1e-6, "noise_epsilon": 0.3}
    gate = make(layers.NoisyTopKGating, **options)
    load = gate(x, training=True, noise=noise).statistics.load
    clean = logits_of(gate, x)
    wanted = oracle.prob_in_top_k(clean, clean, np.full_like(clean, 0.3), K)
    np.testing.assert_allclose(load, wanted.sum(axis=0), rtol=1e-4)


def test_without_noise_the_gate_is_a_top_k_gate(rng):
    x = tokens(rng)
    gate = make(layers.NoisyTopKGating, k=K, noise_stddev=0)
    result = gate(x, training=True)
    np.testing.assert_array_equal(result.gates, gate(x).gates)
    np.testing.assert_array_equal(result.statistics.load, result.statistics.counts)
    assert (gate.has_noise, gate.has_smooth_load) == (False, False)
    assert result.choices_kept == ()
    moe = layers.MoE(layers.FeedForwardExperts(E, 4), gate)
    assert moe.load_loss_weight == 0.0
    with pytest.warns(UserWarning, match="load_loss_weight=0.2.*no gradient"):
        layers.MoE(layers.FeedForwardExperts(E, 4), gate, load_loss_weight=0.2)


def annealed_model(**options):
    """A mixture whose noise is 1 / (1 + steps), with the number of steps to read."""
    schedule = keras.optimizers.schedules.InverseTimeDecay(1.0, 1, 1.0)
    gate = layers.NoisyTopKGating(K, noise_stddev=schedule, name="gate")
    moe = layers.MoE(layers.FeedForwardExperts(E, 4), gate, name="moe")
    model = keras.Sequential([keras.Input((D,)), moe])
    accumulated = options.pop("gradient_accumulation_steps", None)
    model.compile(
        keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulated),
        "mse",
        **options,
    )
    return model, gate


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 11),
        ({"gradient_accumulation_steps": 3}, 3),
        ({"steps_per_execution": 4}, 11),
        pytest.param({"jit_compile": True}, 11, marks=pytest.mark.slow),
        pytest.param({"run_eagerly": True}, 11, marks=pytest.mark.slow),
    ],
)
def test_a_schedule_counts_the_steps_that_have_ended(options, steps, rng, tmp_path):
    model, gate = annealed_model(**options)
    x = tokens(rng, 12 * 4)
    model.fit(x, x, batch_size=4, verbose=0)  # the last call sees the steps before it
    assert int(gate._noise._clock.num_steps) == steps
    # Saved with the model, and counted on.
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    gate = model.get_layer("moe").gating
    assert gate.get_config()["noise_stddev"]["class_name"] == "InverseTimeDecay"
    assert int(gate._noise._clock.num_steps) == steps
    noise = np.zeros((4, E), "float32")
    noise[:, 5] = 1.0
    gate.gate_kernel.assign(np.zeros((D, E)))
    gates = gate(x[:4], training=True, noise=noise).gates.numpy()
    # Softmax over 1 / (1 + steps) and 0.
    np.testing.assert_allclose(gates[:, 0] / gates[:, 1], np.exp(1 / (1 + steps)), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.3, SCHEDULE])
def test_noise_of_both_levels_is_saved_and_has_no_kernel(level, rng, tmp_path):
    moe = layers.HierarchicalMoE(
        layers.FeedForwardExperts(E, 4), 4, noise_stddev=level, z_loss_weight=0.1
    )
    model = keras.Sequential([keras.Input((D,)), moe])
    model.compile("adam", "mse")
    x = tokens(rng)
    logs = model.fit(x, x, batch_size=5, verbose=0).history
    assert 0.0 < logs[f"{moe.name}_choices_kept"][0] <= 1.0
    assert not [v for v in model.weights if "noise_kernel" in v.path]
    moe(x, training=True)
    assert len(moe.losses) == 4
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(copy(x), model(x))
    for gate in (copy.layers[0].gating, copy.layers[0].gating.primary_gating):
        assert gate.z_loss_weight == 0.1
        if level == 0.3:
            assert gate.noise_stddev == 0.3
        else:
            assert int(gate._noise._clock.num_steps) == 4  # the last call noticed it
            assert float(gate.noise_stddev(4)) == pytest.approx(0.2)


@pytest.mark.slow
def test_a_schedule_within_a_recurrence(rng):
    schedule = keras.optimizers.schedules.InverseTimeDecay(1.0, 1, 1.0)
    gate = layers.NoisyTopKGating(K, noise_stddev=schedule)
    inputs = keras.Input((3, D))
    model = keras.Model(inputs, layers.MoELSTM(4, E, gate, name="moe")(inputs))
    model.compile("adam", "mse")
    x, y = rng.normal(size=(12, 3, D)), rng.normal(size=(12, 4))
    logs = model.fit(x, y, batch_size=4, epochs=2, verbose=0).history
    assert int(gate._noise._clock.num_steps) == 5
    assert all(0.0 < kept <= 1.0 for kept in logs["moe_choices_kept"])


# What the noise leaves, in the logs.


def test_choices_kept_are_in_the_logs_of_training_alone(rng):
    x, mask_value = tokens(rng, 64), -7.0
    x[::5] = mask_value
    gate = layers.NoisyTopKGating(
        K, noise_stddev=0.05, gate_initializer="normal", seed=1
    )
    moe = layers.MoE(layers.FeedForwardExperts(E, 4), gate, name="moe")
    model = keras.Sequential(
        [keras.Input((1, D)), keras.layers.Masking(mask_value), moe]
    )
    model.compile(keras.optimizers.SGD(0.0), "mse")
    rows = x[:, np.newaxis]
    usage = keras_moe.telemetry.ExpertUsage(interval=1)
    state = gate.seed_generator.state.numpy()
    logs = model.fit(
        rows,
        rows,
        batch_size=16,
        shuffle=False,
        validation_data=(rows, rows),
        callbacks=[usage],
        verbose=0,
    ).history
    gate.seed_generator.state.assign(state)
    shares = []
    for start in range(0, 64, 16):
        real = x[start : start + 16]
        real = real[real[:, 0] != mask_value]
        noise = gate.draw_noise(len(real)).numpy()
        clean = logits_of(gate, real)
        chosen = [oracle.top_k(row, K) for row in clean + 0.05 * noise]
        shares.append(oracle.choices_kept(clean, chosen))
    wanted = np.mean(np.concatenate(shares))
    assert 0.3 < wanted < 0.99
    assert logs["moe_choices_kept"] == pytest.approx([wanted], rel=1e-6)
    assert not [name for name in logs if name.startswith("val_moe_choices")]
    records = usage.records["moe"]
    found = [record.figures["choices_kept"] for record in records["train"]]
    assert found == pytest.approx([np.mean(each) for each in shares], rel=1e-6)
    assert "choices_kept" not in records["validation"][0].figures
    # Nothing of it is left by an evaluation, and it comes back.
    assert "moe_choices_kept" not in model.evaluate(
        rows, rows, verbose=0, return_dict=True
    )
    assert "moe_choices_kept" in model.fit(rows, rows, verbose=0).history


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 2}])
def test_choices_kept_are_logged_however_steps_run(options, rng):
    moe = layers.MoE(layers.FeedForwardExperts(E, 4), name="moe")
    model = keras.Sequential([keras.Input((D,)), moe])
    model.compile("sgd", "mse", **options)
    x = tokens(rng, 16)
    logs = model.fit(x, x, batch_size=4, validation_data=(x, x), verbose=0).history
    assert 0.0 < logs["moe_choices_kept"][0] < 1.0
    assert "val_moe_choices_kept" not in logs


def test_gates_without_noise_report_no_choices_kept(rng):
    moe = layers.MoE(layers.FeedForwardExperts(E, 4), layers.TopKGating(K), name="moe")
    model = keras.Sequential([keras.Input((D,)), moe])
    model.compile("sgd", "mse")
    x = tokens(rng)
    assert "moe_choices_kept" not in model.fit(x, x, verbose=0).history


@pytest.mark.parametrize("where", ["here", "gpu"])
def test_choices_kept_of_two_levels_are_of_all_decisions(where, rng):
    x = tokens(rng)
    gate = make(layers.HierarchicalGating, noise_stddev=1.0, seed=2)
    primary = gate.primary_gating
    primary.gate_kernel.assign(rng.normal(size=primary.gate_kernel.shape))
    if where == "gpu":
        with serving.gpu_operations():
            result = tf.function(lambda x: gate(x, training=True))(x)
    else:
        result = gate(x, training=True)
    chosen = result.expert_indices.numpy()  # (N, 2): one of each of two groups
    groups, clean = chosen // 2, logits_of(primary, x)
    kept = sum(oracle.choices_kept(clean, groups.tolist()))
    kernels = gate.gate_kernel.numpy().astype("float64")
    for n, row in enumerate(chosen):
        for group, expert in zip(groups[n], row, strict=True):
            own = x[n].astype("float64") @ kernels[group]
            kept += np.argmax(own) == expert % 2
    np.testing.assert_allclose(result.choices_kept, [kept, 20 * 3], rtol=1e-6)


@pytest.mark.parametrize("segments", [None, 2])
def test_choices_kept_leave_the_loop_of_a_recurrence(segments, rng):
    gate = layers.NoisyTopKGating(K, gate_initializer="normal", seed=1)
    lstm = layers.MoELSTM(4, E, gate, segment_length=segments)
    x = rng.normal(size=(5, 3, D)).astype("float32")
    mask = np.arange(3) < np.array([3, 2, 1, 3, 0])[:, np.newaxis]
    lstm(x)
    noise, seen = rng.normal(size=(3 * 5, E)).astype("float32"), []
    gate.draw_noise = lambda num_tokens: tf.constant(noise)
    call = gate.call

    @functools.wraps(call)
    def observed(*arguments, **options):
        result = call(*arguments, **options)
        seen.append([float(each) for each in result.choices_kept])
        return result

    gate.call = observed
    lstm(x, mask=mask, training=True)
    totals = lstm.balance.totals()
    steps = np.sum(seen[:3], axis=0)  # eagerly each step is a call
    assert totals["noisy_tokens"] == mask.sum() == steps[1]
    assert totals["choices_kept"] == pytest.approx(steps[0])
    assert 0 < steps[0] < steps[1]


# What is refused.


@pytest.mark.parametrize(
    ("make_layer", "message"),
    [
        (lambda: layers.TopKGating(z_loss_weight=-1), "`z_loss_weight`.*=-1"),
        (lambda: layers.SwitchGating(switch_loss_weight=-1), "`switch_loss_weight`"),
        (
            lambda: layers.SwitchGating(k=2),
            "`k` of SwitchGating is fixed: 1. Received: k=2.*TopKGating",
        ),
        (
            lambda: layers.SwitchGating(normalization="selected"),
            "`normalization` of SwitchGating is fixed: 'all'",
        ),
        (lambda: layers.TopKGating(input_jitter=1.0), "`input_jitter`.*=1.0"),
        (lambda: layers.TopKGating(scaling_factor=0), "`scaling_factor`.*=0"),
        (
            lambda: layers.NoisyTopKGating(noise_stddev=-0.1),
            "`noise_stddev`.*=-0.1.*'learned'",
        ),
        (
            lambda: layers.HierarchicalGating(2, noise_stddev="none"),
            "`noise_stddev`.*LearningRateSchedule",
        ),
        (
            lambda: layers.MoELSTM(4, 4, layers.TopKGating(2, z_loss_weight=0.1)),
            "`z_loss_weight`.*recurrent.*z_loss_weight=0.1",
        ),
        (
            lambda: layers.MoELSTMCell(4, 4, layers.SwitchGating(input_jitter=0.0)),
            "`switch_loss_weight`.*recurrent",
        ),
        (
            lambda: layers.MoELSTM(4, 4, layers.TopKGating(2, input_jitter=0.1)),
            "`input_jitter`.*recurrent",
        ),
    ],
)
def test_bad_options_are_refused(make_layer, message):
    with pytest.raises(ValueError, match=message):
        make_layer()


def test_a_schedule_needs_a_gate_whose_steps_can_be_counted():
    class Hash(keras.layers.Layer):
        num_experts = None

        def call(self, inputs, mask=None, training=None):
            tokens = tf.range(tf.shape(inputs)[0])[:, tf.newaxis] % self.num_experts
            gates = tf.ones_like(tokens, tf.float32)
            return F.make_gating_result(gates, tokens, self.num_experts)

    layer = layers.HierarchicalMoE(
        layers.FeedForwardExperts(E, 4),
        4,
        k=(1, 1),
        normalization="all",
        primary_gating=Hash(),
        noise_stddev=SCHEDULE,
    )
    with pytest.raises(ValueError, match="`noise_stddev`.*`primary_gating`"):
        layer(np.ones((4, D), "float32"))
