"""FactoredAdam against its oracle, and with everything Keras does with optimizers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, models
from keras_moe.optimizers import FactoredAdam, factors
from tests.oracles import factored_adam as oracle

RNG_SHAPE = (3, 4, 5)


def expert_variable(values, name="kernel", dtype="float64"):
    variable = keras.Variable(values, dtype=dtype, name=name)
    variable.is_expert_weight = True
    return variable


def run(optimizer, variables, gradients):
    """Applies the gradients one after the other; returns the values."""
    optimizer.build(variables)
    for gradient in gradients:
        optimizer.apply_gradients(zip(gradient, variables, strict=True))
    return [v.numpy() for v in variables]


def test_equals_the_oracle_for_expert_weights():
    rng = np.random.default_rng(0)
    start = rng.normal(size=RNG_SHAPE)
    gradients = rng.normal(size=(6, *RNG_SHAPE)) * rng.exponential(size=RNG_SHAPE)
    gradients[:, 2] = 0.0  # an expert that never takes a token
    gradients[3, 1] = 0.0  # one that takes none in one step
    variable = expert_variable(start)
    (found,) = run(
        FactoredAdam(0.05, beta_2=0.9),
        [variable],
        [[tf.constant(g)] for g in gradients],
    )
    wanted = oracle.factored_adam(start, gradients, 0.05, 0.9, 1e-7)
    # The rate passes through float32 in Keras.
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found[2], start[2])


def test_other_weights_get_adam():
    rng = np.random.default_rng(1)
    start = rng.normal(size=(4, 5))
    gradients = rng.normal(size=(6, 4, 5))
    (found,) = run(
        FactoredAdam(0.05, beta_1=0.8, beta_2=0.9),
        [keras.Variable(start, dtype="float64")],
        [[tf.constant(g)] for g in gradients],
    )
    wanted = oracle.adam(start, gradients, 0.05, 0.8, 0.9, 1e-7)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_is_adam_without_momentum_for_squared_gradients_of_rank_one():
    rng = np.random.default_rng(2)
    start = rng.normal(size=RNG_SHAPE)
    a, b = rng.uniform(0.1, 2.0, size=(3, 4)), rng.uniform(0.1, 2.0, size=(3, 5))
    # g^2 = s_t a^2 (b^2)^T with any signs: factors that stay, a scale that moves.
    gradients = [
        s * np.einsum("ei,ej->eij", a, b) * rng.choice([-1.0, 1.0], size=RNG_SHAPE)
        for s in (1.0, 0.3, 2.0, 0.7, 1.5)
    ]
    (found,) = run(
        FactoredAdam(0.05, beta_2=0.9, epsilon=1e-12),
        [expert_variable(start)],
        [[tf.constant(g)] for g in gradients],
    )
    wanted = oracle.adam(start, gradients, 0.05, 0.0, 0.9, 1e-12)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    # With other squares it is an estimate only: the test can fail.
    gradients[0] = rng.normal(size=RNG_SHAPE)
    (other,) = run(
        FactoredAdam(0.05, beta_2=0.9, epsilon=1e-12),
        [expert_variable(start)],
        [[tf.constant(g)] for g in gradients],
    )
    wanted = oracle.adam(start, gradients, 0.05, 0.0, 0.9, 1e-12)
    assert np.max(np.abs(other - wanted)) > 1e-3


def test_blocks_of_experts_are_updated_as_the_whole(monkeypatch):
    rng = np.random.default_rng(6)
    start, gradients = rng.normal(size=(7, 4, 5)), rng.normal(size=(3, 7, 4, 5))
    # Blocks of 3, 3 and 1 experts of 4 * 5 * 8 bytes.
    monkeypatch.setattr(factors, "_BLOCK_BYTES", 3 * 160)
    wanted = oracle.factored_adam(start, gradients, 0.05, 0.9, 1e-7)
    for wrap in (lambda step: step, tf.function):
        variable, optimizer = expert_variable(start), FactoredAdam(0.05, beta_2=0.9)
        optimizer.build([variable])
        step = wrap(stepper(optimizer, variable))
        for gradient in gradients:
            step(tf.constant(gradient))
        np.testing.assert_allclose(variable.numpy(), wanted, rtol=1e-6, atol=1e-7)


# Of which experts each step has a gradient; in the second one twice.
CHOSEN = ((0, 3), (3, 1, 3), (1,), (3, 0), (0,))


def chosen_gradients(seed=7):
    """Start, sparse gradients and the same dense, of 5 experts, the last never chosen."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=(len(experts), 4, 6)) for experts in CHOSEN]
    sparse = [
        tf.IndexedSlices(tf.constant(v), tf.constant(experts), tf.constant([5, 4, 6]))
        for v, experts in zip(values, CHOSEN, strict=True)
    ]
    dense = np.zeros((len(CHOSEN), 5, 4, 6))
    for t, experts in enumerate(CHOSEN):
        np.add.at(dense[t], list(experts), values[t])
    return rng.normal(size=(5, 4, 6)), sparse, dense


@pytest.mark.parametrize("untouched_rows", ["decay", "catch_up", "keep"])
@pytest.mark.parametrize("wrap", [lambda step: step, tf.function])
def test_experts_with_a_gradient_equal_the_oracle(untouched_rows, wrap):
    start, sparse, dense = chosen_gradients()
    variable = expert_variable(start)
    optimizer = FactoredAdam(0.05, beta_2=0.9, untouched_rows=untouched_rows)
    optimizer.build([variable])
    step = wrap(stepper(optimizer, variable))
    for gradient in sparse:
        step(gradient)
    decays = untouched_rows != "keep"
    wanted, rows, columns = oracle.factored_adam_of_chosen(
        start, dense, 0.05, 0.9, 1e-7, decays
    )
    np.testing.assert_allclose(variable.numpy(), wanted, rtol=1e-6, atol=1e-7)
    for slot, average in zip(
        optimizer.slots_of(variable), (rows, columns), strict=True
    ):
        np.testing.assert_allclose(slot.numpy(), average, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(variable.numpy()[4], start[4])
    if decays:
        whole = oracle.factored_adam(start, dense, 0.05, 0.9, 1e-7)
        np.testing.assert_allclose(wanted, whole, rtol=1e-12)


@pytest.mark.parametrize("untouched_rows", ["keep", "catch_up"])
def test_experts_that_are_not_factored_are_rows(untouched_rows):
    start, sparse, dense = chosen_gradients()
    variable = expert_variable(start)
    variable.has_sparse_gradient = True  # as `computation="chosen"` marks it
    options = {"beta_1": 0.8, "beta_2": 0.9, "factored": []}
    optimizer = FactoredAdam(0.05, untouched_rows=untouched_rows, **options)
    run(optimizer, [variable], [[g] for g in sparse])
    gradients = [
        [(e, g[e]) for e in set(experts)]
        for g, experts in zip(dense, CHOSEN, strict=True)
    ]
    function = {
        "keep": oracle.adam_of_rows,
        "catch_up": oracle.adam_of_rows_that_catch_up,
    }[untouched_rows]
    wanted = function(start, gradients, 0.05, 0.8, 0.9, 1e-7)
    np.testing.assert_allclose(variable.numpy(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("untouched_rows", ["keep", "catch_up"])
def test_what_was_not_read_is_not_copied(untouched_rows):
    """After a write of rows, whoever reads a variable gets a copy of all of it."""
    start, slices, _ = look_ups()
    variable = keras.Variable(start, dtype="float64")
    optimizer = FactoredAdam(0.05, untouched_rows=untouched_rows)
    optimizer.build([variable])
    step = tf.function(stepper(optimizer, variable))
    graph = step.get_concrete_function(slices[0]).graph
    operations = graph.get_operations()
    used = [op for op in operations if any(t.consumers() for t in op.outputs)]
    reads = [op for op in used if op.type == "ReadVariableOp"]
    assert not [op for op in reads if op.outputs[0].shape[:1] == [6]]
    # The table itself is read by whoever looks words up.
    [done] = [op for op in operations if op.type == "DisableCopyOnRead"]
    [written] = [op for op in operations if op.type == "ResourceScatterSub"]
    assert done.inputs[0] is written.inputs[0]
    assert written in done.control_inputs


def stepper(optimizer, variable):
    return lambda gradient: optimizer.apply([gradient], [variable])


LOOK_UPS = ((0, 3, 3), (3, 4, 0), (1, 1, 1), (0, 4, 3))


def look_ups(seed=4):
    """Gradients of a table of 6 rows, of which row 2 is never looked up."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(len(LOOK_UPS), 3, 5))
    slices = [
        tf.IndexedSlices(tf.constant(v), tf.constant(rows), tf.constant([6, 5]))
        for v, rows in zip(values, LOOK_UPS, strict=True)
    ]
    return rng.normal(size=(6, 5)), slices, values


def test_rows_that_are_kept_equal_the_oracle():
    start, slices, values = look_ups()
    gradients = [
        list(zip(rows, v, strict=True))
        for rows, v in zip(LOOK_UPS, values, strict=True)
    ]
    wanted = oracle.adam_of_rows(start, gradients, 0.05, 0.8, 0.9, 1e-7)
    optimizer = FactoredAdam(0.05, beta_1=0.8, beta_2=0.9, untouched_rows="keep")
    variable = keras.Variable(start, dtype="float64")
    (found,) = run(optimizer, [variable], [[g] for g in slices])
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found[2], start[2])
    assert not np.any(optimizer.slots_of(variable)[0].numpy()[2])


def test_rows_that_decay_are_adam_on_the_whole_table():
    start, slices, _ = look_ups()
    dense = [tf.convert_to_tensor(g).numpy() for g in slices]
    wanted = oracle.adam(start, dense, 0.05, 0.8, 0.9, 1e-7)
    (found,) = run(
        FactoredAdam(0.05, beta_1=0.8, beta_2=0.9),
        [keras.Variable(start, dtype="float64")],
        [[g] for g in slices],
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    # Row 1 is looked up once, then moved on by its momentum: not kept.
    kept = FactoredAdam(0.05, beta_1=0.8, beta_2=0.9, untouched_rows="keep")
    (other,) = run(
        kept, [keras.Variable(start, dtype="float64")], [[g] for g in slices]
    )
    assert np.max(np.abs(other[1] - found[1])) > 1e-3


@pytest.mark.parametrize("beta_1", [0.8, 0.0])
@pytest.mark.parametrize("wrap", [lambda step: step, tf.function])
def test_rows_that_catch_up_equal_the_oracle(beta_1, wrap):
    start, slices, values = look_ups()
    gradients = [
        list(zip(rows, v, strict=True))
        for rows, v in zip(LOOK_UPS, values, strict=True)
    ]
    wanted = oracle.adam_of_rows_that_catch_up(
        start, gradients, 0.05, beta_1, 0.9, 1e-7
    )
    optimizer = FactoredAdam(0.05, beta_1=beta_1, beta_2=0.9, untouched_rows="catch_up")
    variable = keras.Variable(start, dtype="float64")
    optimizer.build([variable])
    step = wrap(stepper(optimizer, variable))
    for gradient in slices:
        step(gradient)
    np.testing.assert_allclose(variable.numpy(), wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(optimizer._last_steps[0], [4, 3, 0, 4, 4, 0])
    state = {}
    optimizer.save_own_variables(state)
    copy = FactoredAdam.from_config(optimizer.get_config())
    copy.build([variable])
    copy.load_own_variables(state)
    np.testing.assert_array_equal(copy._last_steps[0], optimizer._last_steps[0])


@pytest.mark.parametrize("shape", [(40, 3), (40,)])
def test_rows_that_catch_up_end_where_those_of_adam_do(shape):
    """Once they are read, to the change of the step's size within a few steps."""
    rng = np.random.default_rng(3)
    start = rng.normal(size=shape)
    steps = []
    for t in range(300):  # rows are read every 1, 2, ... steps, at last all of them
        read = [r for r in range(40) if t % (r + 1) == 0 or t == 299]
        steps.append((read, rng.normal(0.3, 1.0, size=(len(read), *shape[1:]))))

    def trained(untouched_rows):
        variable = keras.Variable(start, dtype="float32")
        optimizer = FactoredAdam(0.01, untouched_rows=untouched_rows)
        gradients = [
            [tf.IndexedSlices(tf.constant(v, tf.float32), tf.constant(r), shape)]
            for r, v in steps
        ]
        [found] = run(optimizer, [variable], gradients)
        return found - start

    wanted = trained("decay")

    def error(found):
        return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)

    assert error(trained("catch_up")) < 0.02
    assert error(trained("keep")) > 0.3


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_look_ups_are_clipped_as_keras_does(clip):
    _, (gradient, *_), _ = look_ups()
    dense = tf.ones((2, 2), tf.float64)
    own, keras_own = (
        kind(0.1, **{clip: 0.7})._clip_gradients([gradient, dense])
        for kind in (FactoredAdam, keras.optimizers.Adam)
    )
    assert isinstance(own[0], tf.IndexedSlices)
    np.testing.assert_allclose(own[1], keras_own[1], rtol=1e-6)
    np.testing.assert_allclose(
        tf.convert_to_tensor(own[0]), tf.convert_to_tensor(keras_own[0]), rtol=1e-6
    )


FACTORS = {"experts_kernel": 0.25, "gate": 3.0, "kernel$": 2.0}


def test_factors_of_the_learning_rate_equal_the_oracles():
    """Factored, full, and rows alone: each weight has a rate of its own."""
    rng = np.random.default_rng(7)
    table, slices, values = look_ups()
    rows = [list(zip(r, v, strict=True)) for r, v in zip(LOOK_UPS, values, strict=True)]
    start, gate, bias = (rng.normal(size=s) for s in (RNG_SHAPE, (4, 5), (5,)))
    steps = len(LOOK_UPS)
    kernels, gates, biases = (
        rng.normal(size=(steps, *w.shape)) for w in (start, gate, bias)
    )
    variables = [
        expert_variable(start, "experts_kernel"),
        *(
            keras.Variable(w, dtype="float64", name=name)
            for w, name in ((gate, "gate"), (bias, "bias"), (table, "gate_table"))
        ),
    ]
    gradients = [
        [tf.constant(k), tf.constant(g), tf.constant(b), s]
        for k, g, b, s in zip(kernels, gates, biases, slices, strict=True)
    ]
    adam = (0.8, 0.9, 1e-7)
    wanted = [
        # Both patterns match: a quarter and twice.
        oracle.factored_adam(start, kernels, 0.05 * 0.25 * 2.0, 0.9, 1e-7),
        oracle.adam(gate, gates, 0.05 * 3.0, *adam),
        oracle.adam(bias, biases, 0.05, *adam),
        oracle.adam_of_rows(table, rows, 0.05 * 3.0, *adam),
    ]
    options = {"beta_1": 0.8, "beta_2": 0.9, "untouched_rows": "keep"}
    optimizer = FactoredAdam(0.05, learning_rate_factors=FACTORS, **options)
    for found, expected in zip(
        run(optimizer, variables, gradients), wanted, strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    # Half of the steps, and the rest by a copy of the optimizer, with its state.
    for variable, value in zip(variables, (start, gate, bias, table), strict=True):
        variable.assign(value)
    first = FactoredAdam.from_config(optimizer.get_config())
    run(first, variables, gradients[:2])
    second = FactoredAdam.from_config(first.get_config())
    assert second.learning_rate_factors == FACTORS
    second.build(variables)
    state = {}
    first.save_own_variables(state)
    second.load_own_variables({k: np.array(v) for k, v in state.items()})
    for found, expected in zip(
        run(second, variables, gradients[2:]), wanted, strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_a_factor_goes_with_a_schedule_and_with_adam_on_all_weights():
    rng = np.random.default_rng(8)
    start, gradients = rng.normal(size=(4, 5)), rng.normal(size=(3, 4, 5))
    rates = [0.05, 0.02, 0.01]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], rates)
    variable = keras.Variable(start, dtype="float64", name="experts_kernel")
    optimizer = FactoredAdam(
        schedule, 0.8, 0.9, factored=[], learning_rate_factors={"experts": 0.5, "k": 1}
    )
    (found,) = run(optimizer, [variable], [[tf.constant(g)] for g in gradients])
    # Adam's moments do not depend on the rate: the steps' differences do.
    wanted, before = start, start
    for number, rate in enumerate(rates, 1):
        now = oracle.adam(start, gradients[:number], 1.0, 0.8, 0.9, 1e-7)
        wanted, before = wanted + 0.5 * rate * (now - before), now
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    frozen = FactoredAdam(0.1, learning_rate_factors={"experts": 0})
    (left,) = run(frozen, [variable], [[tf.constant(gradients[0])]])
    np.testing.assert_array_equal(left, found)


def test_scaling_all_gradients_changes_nothing_even_near_underflow():
    gradients = np.random.default_rng(3).normal(size=(4, *RNG_SHAPE))
    found = [
        run(
            FactoredAdam(0.1, epsilon=1e-30),
            [expert_variable(np.zeros(RNG_SHAPE), dtype="float32")],
            [[tf.constant(g * scale, tf.float32)] for g in gradients],
        )[0]
        for scale in (1.0, 1e-15, 1e15)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4)


def test_state_of_expert_weights_is_rows_and_columns():
    experts = layers.FeedForwardExperts(8, hidden_units=64, use_bias=True)
    experts.build((None, 32))
    dense = keras.Variable(np.zeros((32, 64)), name="dense")
    optimizer = FactoredAdam()
    optimizer.build([*experts.trainable_variables, dense])
    row, column = optimizer.slots_of(experts.kernels[0])
    assert tuple(row.shape) == (8, 32)
    assert tuple(column.shape) == (8, 64)
    # 8 * 2 * (32 + 64) numbers for 8 * 2 * 32 * 64 weights.
    state = sum(
        s.shape.num_elements() for k in experts.kernels for s in optimizer.slots_of(k)
    )
    assert state == 8 * 2 * 96
    for full in (dense, experts.biases[0]):
        assert [s.shape for s in optimizer.slots_of(full)] == [full.shape] * 2


def test_patterns_choose_the_weights():
    kernel, other = (
        keras.Variable(np.zeros((2, 3)), name=name) for name in ("mine", "others")
    )
    optimizer = FactoredAdam(factored=["^mine"])
    optimizer.build([kernel, other])
    assert [tuple(s.shape) for s in optimizer.slots_of(kernel)] == [(2,), (3,)]
    assert [tuple(s.shape) for s in optimizer.slots_of(other)] == [(2, 3)] * 2
    copy = FactoredAdam.from_config(optimizer.get_config())
    assert copy.factored == ("^mine",)
    assert copy.untouched_rows == "decay"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factored": "kernel"}, "factored='kernel'"),
        ({"factored": ["("]}, r"factored=\['\('\]"),
        ({"amsgrad": True}, "amsgrad=True"),
        ({"untouched_rows": "lazy"}, "untouched_rows='lazy'"),
        ({"untouched_rows": "catch_up", "beta_1": 0.95, "beta_2": 0.9}, "beta_1=0.95"),
        ({"beta_2": 1.0}, "beta_2=1.0"),
        ({"beta_1": -0.1}, "beta_1=-0.1"),
        ({"learning_rate_factors": ["kernel"]}, r"factors=\['kernel'\]"),
        ({"learning_rate_factors": {"(": 1.0}}, r"factors=\{'\(': 1.0\}"),
        ({"learning_rate_factors": {"kernel": -1.0}}, "learning_rate_factors=-1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FactoredAdam(**arguments)


def test_patterns_that_fit_no_weight_are_refused():
    variable = keras.Variable(np.zeros(3), name="bias")
    with pytest.raises(ValueError, match="'kernel', which matches none"):
        FactoredAdam(factored=["kernel"]).build([variable])
    with pytest.raises(ValueError, match="`learning_rate_factors` must match.*'gate'"):
        FactoredAdam(learning_rate_factors={"gate": 2.0}).build([variable])
    with pytest.raises(ValueError, match=r"'bias' of shape \(3,\)"):
        FactoredAdam(factored=["bias"]).build([variable])


def small_model(**options):
    moe = layers.MoE(
        layers.FeedForwardExperts(6, hidden_units=8), layers.NoisyTopKGating(k=2)
    )
    model = keras.Sequential([keras.Input((4,)), moe, keras.layers.Dense(1)])
    model.compile(FactoredAdam(0.01, **options), "mse")
    return model


def data(n=64):
    x = np.random.default_rng(0).normal(size=(n, 4)).astype("float32")
    return x, np.sin(x.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        *(
            pytest.param(options, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for options in (
                {"clipnorm": 0.5},
                {"global_clipnorm": 0.5},
                {"weight_decay": 0.01},
                {"use_ema": True},
            )
        ),
    ],
    ids=lambda o: next(iter(o), "plain"),
)
def test_trains_with_the_options_of_keras(options):
    keras.utils.set_random_seed(0)
    model = small_model(**options)
    losses = model.fit(*data(), epochs=15, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def test_a_saved_model_goes_on_training_as_if_it_had_not_been_saved(tmp_path):
    keras.utils.set_random_seed(0)
    model = small_model()
    model.layers[0].gating.noise_epsilon = 0.0
    x, y = data(16)
    model.fit(x, y, epochs=3, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, FactoredAdam)
    for mine, other in zip(
        model.optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(mine.numpy(), other.numpy())
    kernel = loaded.layers[0].experts.kernels[0]
    assert len(loaded.optimizer.slots_of(kernel)[0].shape) == 2
    gradients = [np.full(v.shape, 0.1, "float32") for v in model.trainable_variables]
    for m in (model, loaded):
        m.optimizer.apply_gradients(
            zip(map(tf.constant, gradients), m.trainable_variables, strict=True)
        )
    for mine, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


def test_loss_scaling_leaves_the_update_as_it_is():
    keras.utils.set_random_seed(0)
    start = np.random.default_rng(0).normal(size=RNG_SHAPE).astype("float32")
    gradients = np.random.default_rng(1).normal(size=(3, *RNG_SHAPE)).astype("float32")
    (plain,) = run(
        FactoredAdam(0.05),
        [expert_variable(start, dtype="float32")],
        [[tf.constant(g)] for g in gradients],
    )
    scaled = keras.optimizers.LossScaleOptimizer(FactoredAdam(0.05), initial_scale=64.0)
    (found,) = run(
        scaled,
        [expert_variable(start, dtype="float32")],
        [[tf.constant(64.0 * g)] for g in gradients],
    )
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    keras.config.set_dtype_policy("mixed_float16")
    model = small_model()
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    losses = model.fit(*data(), epochs=10, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_trains_a_language_model_with_a_hierarchical_mixture():
    keras.utils.set_random_seed(0)
    small = models.scale_down(
        models.preset("moe_1024_h_100b"), factor=32, max_experts=16, vocabulary_size=20
    )
    model = models.build_language_model(small)
    model.compile(
        FactoredAdam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    tokens = np.tile(np.arange(1, 9, dtype="int32"), (4, 1))
    losses = model.fit(tokens, np.roll(tokens, -1, 1), epochs=40, verbose=0)
    assert losses.history["loss"][-1] < 0.8 * losses.history["loss"][0]
    kernel = model.moe_layers[0].experts.kernels[0]
    assert len(model.optimizer.slots_of(kernel)[0].shape) == 2
    gate = model.moe_layers[0].gating.gate_kernel  # rank 3, but no expert's
    assert len(model.optimizer.slots_of(gate)[0].shape) == 3


@pytest.mark.parametrize("epsilon", [0, 1e-39, -1.0, float("nan")])
def test_an_epsilon_that_leaves_untouched_experts_nan_is_refused(epsilon):
    with pytest.raises(ValueError, match="`epsilon` must be"):
        FactoredAdam(epsilon=epsilon)


def test_the_least_epsilon_keeps_an_expert_without_a_gradient():
    experts = layers.FeedForwardExperts(2, hidden_units=3)
    experts.build((None, 4))
    optimizer = FactoredAdam(1.0, epsilon=1e-19)
    kernel = experts.kernels[0]
    before = kernel.numpy()
    # The square of 1e-25 is 0 in float32; the step is 1e-25 / 1e-19 at most.
    gradient = np.stack([np.zeros((4, 3)), np.full((4, 3), 1e-25)]).astype("float32")
    other = np.zeros(experts.kernels[1].shape, "float32")
    optimizer.apply([gradient, other], experts.trainable_variables)
    np.testing.assert_array_equal(kernel.numpy()[0], before[0])
    np.testing.assert_allclose(kernel.numpy()[1], before[1], atol=1e-5)
