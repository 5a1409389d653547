"""Regularizers, constraints, freezing: for one expert, in a stack of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, optimizers

D, H, E = 4, 3, 5


def make(**options):
    options = {"use_bias": True, "bias_initializer": "normal", **options}
    return layers.FeedForwardExperts(E, H, **options)


def in_model(experts, optimizer="sgd", **options):
    moe = layers.MoE(
        experts,
        layers.NoisyTopKGating(k=2, gate_initializer="glorot_normal", seed=0),
        importance_loss_weight=0.0,
        load_loss_weight=0.0,
    )
    model = keras.Sequential([keras.Input((D,)), moe])
    model.compile(optimizer, "mse", **options)
    return model


def data(rng, n=32):
    x = rng.normal(size=(n, D)).astype("float32")
    return x, np.tanh(x[:, ::-1])


def singles(experts, **options):
    """Each expert as Keras layers with the same weights."""
    found = []
    for e in range(E):
        model = keras.Sequential(
            [
                keras.Input((D,)),
                keras.layers.Dense(H, "relu", **options),
                keras.layers.Dense(D, **options),
            ]
        )
        weights = zip(experts.kernels, experts.biases, strict=True)
        model.set_weights([w.numpy()[e] for pair in weights for w in pair])
        found.append(model)
    return found


@pytest.mark.parametrize(
    "regularizer", ["l1", "l2", keras.regularizers.OrthogonalRegularizer(0.1)]
)
def test_regularization_is_the_sum_of_that_of_single_networks(regularizer):
    experts = make(kernel_regularizer=regularizer, bias_regularizer="l2")
    experts.build((None, D))
    expected = sum(
        float(tf.add_n(model.losses))
        for model in singles(
            experts, kernel_regularizer=regularizer, bias_regularizer="l2"
        )
    )
    assert len(experts.losses) == 4  # two kernels, two biases
    assert float(tf.add_n(experts.losses)) == pytest.approx(expected, rel=1e-5)


def test_regularization_is_added_once_a_step_and_trains_all_experts(rng):
    experts = make(kernel_regularizer=keras.regularizers.L2(0.5), use_bias=False)
    model = in_model(experts, keras.optimizers.SGD(0.1))
    x, _ = data(rng)
    plain = in_model(make(use_bias=False))
    plain.set_weights(model.get_weights())
    penalty = 0.5 * sum(float(tf.reduce_sum(k**2)) for k in experts.kernels)
    loss = model.evaluate(x, x, verbose=0, return_dict=True)["loss"]
    assert loss - plain.evaluate(x, x, verbose=0, return_dict=True)[
        "loss"
    ] == pytest.approx(penalty, rel=1e-4)
    # Without tokens only the penalty moves an expert: w - 0.1 * 2 * 0.5 * w.
    before = experts.kernels[0].numpy()
    model.layers[0].gating.gate_kernel.assign(np.zeros((D, E)))
    with tf.GradientTape() as tape:
        total = tf.add_n(model.losses)
    gradients = tape.gradient(total, [v.value for v in experts.kernels])
    model.optimizer.apply(gradients, experts.kernels)
    np.testing.assert_allclose(experts.kernels[0], 0.9 * before, rtol=1e-5)


@pytest.mark.parametrize(
    "constraint",
    [
        keras.constraints.MaxNorm(0.3, axis=0),
        keras.constraints.MaxNorm(0.3, axis=[0, 1]),
        keras.constraints.MinMaxNorm(0.5, 0.6, axis=1),
        keras.constraints.UnitNorm(axis=-1),
        keras.constraints.NonNeg(),
        lambda w: w / tf.reduce_max(tf.abs(w)),  # over one expert
    ],
)
def test_a_constraint_is_that_of_every_expert_by_itself(constraint, rng):
    experts = make(kernel_constraint=constraint, bias_constraint="non_neg")
    model = in_model(experts, keras.optimizers.SGD(0.0))
    before = [kernel.numpy() for kernel in experts.kernels]
    model.fit(*data(rng), verbose=0)
    for kernel, old in zip(experts.kernels, before, strict=True):
        expected = [tf.convert_to_tensor(constraint(tf.constant(w))) for w in old]
        np.testing.assert_allclose(kernel, expected, atol=1e-6)
    for bias in experts.biases:
        assert (bias.numpy() >= 0).all()


RULES = {
    "kernel_regularizer": keras.regularizers.L2(0.02),
    "bias_regularizer": "l1",
    "kernel_constraint": keras.constraints.MaxNorm(0.7),
    "bias_constraint": "non_neg",
    "frozen_experts": (1, 3),
}


def test_rules_survive_a_file_and_files_of_before_load(rng, tmp_path):
    model = in_model(make(**RULES), "adam")
    x, y = data(rng)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    experts = loaded.layers[0].experts
    assert experts.get_config() == model.layers[0].experts.get_config()
    assert experts.frozen_experts == (1, 3)
    np.testing.assert_allclose(
        [float(loss) for loss in loaded.losses],
        [float(loss) for loss in model.losses],
        rtol=1e-6,
    )
    assert all(w.constraint is not None for w in experts.trainable_variables)
    config = experts.get_config()
    for name in RULES:
        del config[name]
    old = layers.FeedForwardExperts.from_config(config)
    old.build((None, D))
    assert old.losses == []
    assert all(w.constraint is None for w in old.variables)


# Freezing.

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "AdamW": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.3),
    "Lion": lambda: keras.optimizers.Lion(0.1, weight_decay=0.3),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.1, weight_decay=0.3),
    "FactoredAdam": lambda: optimizers.FactoredAdam(0.1, weight_decay=0.3),
    "accumulated": lambda: keras.optimizers.AdamW(
        0.1, weight_decay=0.3, gradient_accumulation_steps=2
    ),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.AdamW(0.1, weight_decay=0.3)
    ),
}


FEW = ("AdamW", "FactoredAdam", "accumulated")
REST = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FEW else REST) for name in OPTIMIZERS],
)
def test_frozen_experts_stay_bit_for_bit_and_the_others_train(name, rng):
    # First all train, so that the optimizer has a state for each.
    rules = {"kernel_constraint": keras.constraints.MaxNorm(0.9)}
    experts = make(kernel_regularizer=keras.regularizers.L2(0.01), **rules)
    x, y = data(rng)
    model = in_model(experts, OPTIMIZERS[name]())
    model.fit(x, y, batch_size=8, verbose=0)
    experts.frozen_experts = [0, 3]
    optimizer = model.optimizer  # goes on with its moments
    model.compile(optimizer, "mse")
    before = [w.numpy() for w in experts.trainable_variables]
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    for weight, old in zip(experts.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(weight.numpy()[[0, 3]], old[[0, 3]])
        assert (np.abs(weight.numpy() - old)[[1, 2, 4]] > 0).any()
    # Thawed, they go on.
    experts.frozen_experts = ()
    model.compile(optimizer, "mse")
    model.fit(x, y, batch_size=8, verbose=0)
    kernel = experts.kernels[0].numpy()
    assert (np.abs(kernel - before[0]).reshape(E, -1).max(axis=1) > 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"run_eagerly": True},
        {"jit_compile": False},
        {"steps_per_execution": 2, "jit_compile": False},
    ],
    ids=str,
)
def test_freezing_holds_however_a_step_runs(options, rng):
    experts = make(frozen_experts=(2,), recompute=True)
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.3)
    model = in_model(experts, optimizer, **options)
    before = [w.numpy()[2] for w in experts.trainable_variables]
    model.fit(*data(rng), batch_size=8, verbose=0)
    for weight, old in zip(experts.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(weight.numpy()[2], old)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_freezing_is_exact_in_half_precision(policy, rng):
    keras.config.set_dtype_policy(policy)
    experts = make(frozen_experts=(2,))
    model = in_model(experts, keras.optimizers.AdamW(0.1, weight_decay=0.3))
    before = [w.numpy()[2] for w in experts.trainable_variables]
    model.fit(*data(rng), batch_size=8, verbose=0)
    for weight, old in zip(experts.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(weight.numpy()[2], old)


def test_an_own_loop_keeps_frozen_experts(rng):
    experts = make(frozen_experts=(2,))
    model = in_model(experts)
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.3)
    optimizer.build(model.trainable_variables)
    before = [w.numpy()[2] for w in experts.trainable_variables]

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        variables = model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        optimizer.apply(gradients, variables)

    x, y = map(tf.constant, data(rng))
    for run in (step, tf.function(step)):
        run(x, y)
        run(x, y)
    for weight, old in zip(experts.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(weight.numpy()[2], old)


def test_freezing_changes_no_answer_and_no_other_gradient(rng):
    x, y = data(rng)
    found = []
    for frozen in ((), (2,)):
        keras.utils.set_random_seed(1)
        experts = make(frozen_experts=frozen)
        model = in_model(experts)
        inputs = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = model(inputs)
            loss = tf.reduce_sum((outputs - y) ** 2)
        variables = [v.value for v in model.trainable_variables]
        gradients = tape.gradient(
            loss, [inputs, *variables], unconnected_gradients="zero"
        )
        names = ["inputs", *(v.path for v in model.trainable_variables)]
        found.append((outputs, names, list(map(tf.convert_to_tensor, gradients))))
    (first, names, wanted), (second, _, gradients) = found
    np.testing.assert_array_equal(first, second)
    for name, a, b in zip(names, wanted, gradients, strict=True):
        a, b = a.numpy(), b.numpy()
        if "feed_forward" in name:
            assert np.abs(a[2]).max() > 0
            a[2] = 0
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("value", [(5,), (-1,), (1, 1), 2, "0", (1.0,), (True,), None])
def test_bad_frozen_experts_are_refused(value):
    with pytest.raises(ValueError, match=r"`frozen_experts` .*num_experts=5"):
        make(frozen_experts=value)
    with pytest.raises(ValueError, match="`frozen_experts`"):
        make().frozen_experts = value


def test_an_expert_of_a_list_that_is_not_trainable_stays(rng):
    frozen = keras.layers.Dense(D)
    frozen.trainable = False
    listed = layers.ExpertList([keras.layers.Dense(D), frozen, keras.layers.Dense(D)])
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.3)
    model = in_model(listed, optimizer)
    before = [w.numpy() for w in listed.weights]
    model.fit(*data(rng), verbose=0)
    changed = [
        np.abs(w.numpy() - old).max() > 0
        for w, old in zip(listed.weights, before, strict=True)
    ]
    assert [w.trainable for w in listed.weights] == changed
    assert sum(changed) == 4
    assert len(model.trainable_variables) == 2 + 4
    reloaded = keras.models.clone_model(model).layers[0].experts
    assert not reloaded.experts[1].trainable


@pytest.mark.parametrize(
    "gate",
    [
        layers.SoftmaxGating(3, use_bias=True),
        layers.TopKGating(2, 3, use_bias=True),
        layers.NoisyTopKGating(2, 3, use_bias=True),
        layers.BalancedGating(2, 3, use_bias=True),
        layers.HierarchicalGating(1, (1, 2), num_experts=3, use_bias=True),
    ],
)
def test_the_bias_of_a_gate_moves_its_choice(gate):
    gate = type(gate).from_config(gate.get_config())
    gate.build((None, D))
    gate.gate_kernel.assign(np.zeros(gate.gate_kernel.shape))
    np.testing.assert_array_equal(gate.gate_bias, np.zeros(gate.gate_bias.shape))
    bias = np.array([0.0, 3.0, 2.0])
    gate.gate_bias.assign(bias.reshape(gate.gate_bias.shape))
    importance = gate(np.ones((4, D), "float32")).statistics.importance.numpy()
    # Softmax of 3 and 2, or of 0, 3 and 2, for each of 4 tokens.
    kept = (
        np.exp(bias)
        if isinstance(gate, layers.SoftmaxGating)
        else [0, *np.exp(bias[1:])]
    )
    if isinstance(gate, layers.BalancedGating):
        kept = [0, np.exp(3.0), 0]  # above the threshold of 1/3
    np.testing.assert_allclose(importance, 4 * np.array(kept) / np.sum(kept), rtol=1e-5)
    gate.gate_bias.assign(np.zeros(gate.gate_bias.shape))
    with tf.GradientTape() as tape:
        total = gate(np.ones((4, D), "float32"), training=True).gates
        total = tf.reduce_sum(total[..., 0] ** 2)
    assert tape.gradient(total, gate.gate_bias.value) is not None
