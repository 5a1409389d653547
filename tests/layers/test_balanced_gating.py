import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import layers
from tests.helpers import assert_value_and_gradients
from tests.oracles import balancing as oracle

D, E, H = 4, 6, 5


def make_gate(k=2, num_experts=E, seed=0):
    gate = layers.BalancedGating(
        k, num_experts, gate_initializer=keras.initializers.RandomNormal(seed=seed)
    )
    gate.build((None, D))
    # Logits of about one, so that the order of the gates does not hang on rounding.
    gate.gate_kernel.assign(10.0 * gate.gate_kernel)
    return gate


def make_moe(k=2, dtype=None, **kwargs):
    experts = layers.FeedForwardExperts(E, hidden_units=H, dtype=dtype)
    gating = layers.BalancedGating(
        k, gate_initializer=keras.initializers.RandomNormal(stddev=0.5), dtype=dtype
    )
    kwargs = {"importance_loss_weight": 0.0, "load_loss_weight": 0.0, **kwargs}
    layer = layers.MoE(experts, gating, dtype=dtype, **kwargs)
    layer.build((None, D))
    return layer


def tokens(rng, n):
    return rng.normal(size=(n, D)).astype("float32")


def dense(result, num_tokens):
    """The gates of a ragged plan as the `(N, E)` matrix of the paper."""
    plan = F.make_plan(result)
    gates = np.zeros((num_tokens, plan.counts.shape[0]))
    owners = plan.token_indices.numpy()[plan.positions.numpy()]
    np.testing.assert_array_equal(owners, result.token_indices)
    gates[owners, plan.expert_indices.numpy()] = result.gates.numpy()
    return gates


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k", "m"),
    # k N / E: 24/6 = 4; 14/6 = 2.33; 2/6, at least 1; 5; 21/8 = 2.6; 0.
    [
        (12, 6, 2, 4),
        (7, 6, 2, 2),
        (1, 6, 2, 1),
        (5, 6, 6, 5),
        (7, 8, 3, 3),
        (0, 6, 2, 0),
    ],
)
def test_every_expert_gets_exactly_m_tokens_in_training(
    rng, num_tokens, num_experts, k, m
):
    gate = make_gate(k, num_experts)
    result = gate(tokens(rng, num_tokens), training=True)
    assert F.make_plan(result).counts.numpy().tolist() == [m] * num_experts
    assert result.statistics.counts.numpy().tolist() == [m] * num_experts
    np.testing.assert_array_equal(result.statistics.load, [float(m)] * num_experts)
    assert result.gates.shape == (m * num_experts,)


def test_ties_do_not_unbalance_the_experts():
    gate = layers.BalancedGating(2, 4, gate_initializer="zeros")
    result = gate(np.ones((6, D), "float32"), training=True)
    assert result.statistics.counts.numpy().tolist() == [3, 3, 3, 3]
    # The first three tokens go to all experts, the others to none.
    expected = np.repeat([[0.25], [0.0]], 3, axis=0) * np.ones(4)
    np.testing.assert_allclose(dense(result, 6), expected)


def test_default_initialisation_does_not_tie(rng):
    gate = layers.BalancedGating(2, 4)
    result = gate(tokens(rng, 40), training=True)
    np.testing.assert_allclose(gate.thresholds, [0.25] * 4)
    assert 0.01 < np.std(gate.gate_kernel) < 0.03
    assert ((dense(result, 40) > 0).sum(axis=1) > 0).sum() > 20


@pytest.mark.parametrize("training", [True, False])
def test_gates_and_statistics_equal_oracle(rng, training):
    gate = make_gate()
    x = tokens(rng, 9)
    softmax_gates = oracle.softmax_gates((x @ gate.gate_kernel.numpy()).astype(float))
    if training:
        mask = oracle.batchwise_mask(softmax_gates, 3)
    else:
        mask = oracle.threshold_mask(softmax_gates, gate.thresholds.numpy())
    expected = oracle.masked_gates(softmax_gates, mask)
    result = gate(x, training=training)
    np.testing.assert_allclose(dense(result, 9), expected, rtol=1e-5)
    np.testing.assert_allclose(
        result.statistics.importance, expected.sum(axis=0), rtol=1e-5
    )
    np.testing.assert_array_equal(result.statistics.counts, mask.sum(axis=0))
    np.testing.assert_array_equal(result.statistics.load, mask.sum(axis=0))
    owners = result.token_indices.numpy()
    assert (np.diff(owners) >= 0).all()  # in the order of the tokens


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_threshold_loss_is_the_mean_over_tokens_and_only_in_training(rng, weight):
    gate = make_gate()
    gate.threshold_loss_weight = weight
    x = tokens(rng, 9)
    softmax_gates = oracle.softmax_gates((x @ gate.gate_kernel.numpy()).astype(float))
    expected = oracle.threshold_loss(softmax_gates, gate.thresholds.numpy(), 3)
    (loss,) = gate(x, training=True).auxiliary_losses
    assert float(loss) == pytest.approx(weight * expected / 9, rel=1e-4)
    assert gate(x, training=False).auxiliary_losses == ()


def test_weight_of_zero_leaves_the_threshold_loss_out(rng):
    gate = layers.BalancedGating(2, E, threshold_loss_weight=0.0)
    assert gate(tokens(rng, 9), training=True).auxiliary_losses == ()


def test_inference_does_not_depend_on_the_other_tokens(rng):
    layer = make_moe()
    x = tokens(rng, 12)
    together = layer(x).numpy()
    alone = np.concatenate([layer(x[i : i + 1]).numpy() for i in range(12)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_training_with_k_equal_to_num_experts_is_softmax_gating(rng):
    x = tokens(rng, 7)
    gate, softmax = make_gate(k=E), layers.SoftmaxGating(E)
    softmax.build((None, D))
    softmax.gate_kernel.assign(gate.gate_kernel)
    np.testing.assert_allclose(
        dense(gate(x, training=True), 7), softmax(x).gates, rtol=1e-6
    )


@pytest.mark.parametrize("training", [True, False])
def test_permuting_tokens_permutes_outputs(rng, training):
    layer = make_moe()
    x, order = tokens(rng, 12), rng.permutation(12)
    np.testing.assert_allclose(
        layer(x[order], training=training),
        layer(x, training=training).numpy()[order],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("training", [True, False])
def test_permuting_experts_changes_nothing(rng, training):
    options = {"importance_loss_weight": 0.1, "losses_in_evaluation": True}
    layer, moved = make_moe(**options), make_moe(**options)
    order = rng.permutation(E)
    layer.gating.thresholds.assign(rng.uniform(0.1, 0.3, size=E))
    for variable, other in zip(layer.variables, moved.variables, strict=True):
        if "gate_kernel" in variable.path:
            other.assign(variable.numpy()[:, order])
        elif variable.shape and variable.shape[0] == E:
            other.assign(variable.numpy()[order])
    x = tokens(rng, 12)
    np.testing.assert_allclose(
        moved(x, training=training), layer(x, training=training), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(moved.losses, layer.losses, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_moe_equals_dense_enumeration_in_value_and_gradients(rng, training):
    layer = make_moe(dtype="float64")
    x = rng.normal(size=(10, D))
    kernels = [v.numpy() for v in layer.experts.trainable_variables]
    assert [k.shape for k in kernels] == [(E, D, H), (E, H, D)]
    thresholds = None if training else layer.gating.thresholds.numpy()

    def outputs(x, gate_kernel, *kernels):
        values = [gate_kernel, *kernels]
        own = [layer.gating.gate_kernel, *layer.experts.trainable_variables]
        with keras.StatelessScope(state_mapping=list(zip(own, values, strict=True))):
            return layer(x, training=training)

    assert_value_and_gradients(
        outputs,
        lambda x, w, *kernels: oracle.balanced_mixture(
            x, w, kernels, k=2, thresholds=thresholds
        ),
        [x, layer.gating.gate_kernel.numpy(), *kernels],
    )


def test_task_trains_the_gate_and_the_threshold_loss_only_the_thresholds(rng):
    layer = make_moe()
    gate = layer.gating
    x = tokens(rng, 10)
    with tf.GradientTape(persistent=True) as tape:
        task = tf.reduce_sum(layer(x, training=True) * tokens(rng, 10))
        (loss,) = layer.losses
    kernel, thresholds = gate.gate_kernel.value, gate.thresholds.value
    assert np.abs(tape.gradient(task, kernel)).max() > 1e-3
    assert tape.gradient(task, thresholds) is None
    assert tape.gradient(loss, kernel) is None
    # 20 assignments over 6 experts: m = 3 for each, over 10 tokens.
    softmax_gates = oracle.softmax_gates((x @ gate.gate_kernel.numpy()).astype(float))
    admitted = oracle.threshold_mask(softmax_gates, gate.thresholds.numpy()).sum(axis=0)
    assert len(set(admitted)) > 1
    np.testing.assert_allclose(
        tape.gradient(loss, thresholds), (3 - admitted) / 10, rtol=1e-6
    )


def test_importance_loss_reaches_the_gate_and_load_loss_does_not(rng):
    layer = make_moe(importance_loss_weight=1.0, load_loss_weight=1.0)
    with tf.GradientTape(persistent=True) as tape:
        layer(tokens(rng, 10), training=True)
        importance, load, _ = layer.losses
    kernel = layer.gating.gate_kernel.value
    assert np.abs(tape.gradient(importance, kernel)).max() > 1e-4
    assert float(load) == 0.0
    assert tape.gradient(load, kernel) is None


@pytest.mark.parametrize("training", [True, False])
def test_a_token_without_experts_gets_exactly_zero_and_finite_gradients(rng, training):
    layer = make_moe(k=1)
    # Unit columns w_e, and two tokens 3 w_e for each: their gate of expert e is
    # above 1/6. All gates of the last token are 1/6, below the threshold and, with
    # m = round(13 / 6) = 2, out of the batchwise mask.
    kernel = layer.gating.gate_kernel.numpy()
    kernel /= np.linalg.norm(kernel, axis=0)
    layer.gating.gate_kernel.assign(kernel)
    x = np.concatenate([3 * kernel.T, 3 * kernel.T, np.zeros((1, D), "float32")])
    layer.gating.thresholds.assign([0.2] * E)
    assert 12 not in layer.gating(x, training=training).token_indices.numpy()
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, training=training)
        total = tf.reduce_sum(outputs**2) + sum(layer.losses)
    np.testing.assert_array_equal(outputs[-1], np.zeros(D))
    gradients = tape.gradient(total, [inputs, layer.gating.gate_kernel.value])
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[0][-1], np.zeros(D))


def test_thresholds_above_every_gate_leave_all_tokens_without_experts(rng):
    layer = make_moe()
    layer.gating.thresholds.assign([1.0] * E)
    np.testing.assert_array_equal(layer(tokens(rng, 5)), np.zeros((5, D)))


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_fewer_tokens_than_experts(rng, num_tokens, training):
    layer = make_moe(importance_loss_weight=0.1, losses_in_evaluation=True)
    outputs = layer(tokens(rng, num_tokens), training=training)
    assert outputs.shape == (num_tokens, D)
    assert np.isfinite(outputs).all()
    assert np.isfinite(layer.losses).all()
    if training:
        # 2 * 3 / 6 = 1, and at least 1 if there is a token.
        expected = [min(num_tokens, 1)] * E
        assert layer.balance.counts().numpy().tolist() == expected


@pytest.mark.parametrize("training", [True, False])
def test_padding_is_neither_routed_nor_counted(rng, training):
    x = rng.normal(size=(3, 6, D)).astype("float32")
    mask = np.arange(6) < np.array([[6], [3], [0]])
    x[~mask] *= 100.0  # would win every place
    layer = make_moe(importance_loss_weight=0.1, losses_in_evaluation=True)
    outputs = layer(x, mask=mask, training=training).numpy()
    losses = [float(loss) for loss in layer.losses]
    counts = layer.balance.counts().numpy()
    np.testing.assert_array_equal(outputs[~mask], 0.0)
    layer.balance.reset_state()
    real = layer(x[mask], training=training)
    np.testing.assert_allclose(outputs[mask], real, rtol=1e-6)
    np.testing.assert_allclose(losses, layer.losses, rtol=1e-6)
    np.testing.assert_array_equal(counts, layer.balance.counts())
    if training:
        assert counts.tolist() == [3] * E  # 2 * 9 / 6 of the real tokens


def test_padding_alone(rng):
    layer = make_moe()
    x = rng.normal(size=(2, 3, D)).astype("float32")
    outputs = layer(x, mask=np.zeros((2, 3), bool), training=True)
    np.testing.assert_array_equal(outputs, np.zeros((2, 3, D)))
    assert float(layer.losses[0]) == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_a_mask_given_to_the_gate_itself_keeps_the_numbers_of_the_tokens(rng, training):
    gate = make_gate()
    x = tokens(rng, 9)
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 1, 0], bool)
    gates = dense(gate(x, mask=mask, training=training), 9)
    np.testing.assert_array_equal(gates[~mask], 0.0)
    real = gate(x[mask], training=training)
    np.testing.assert_allclose(gates[mask], dense(real, 6), rtol=1e-6)


@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "mixed_bfloat16"])
def test_half_precision_inputs_are_gated_in_float32(rng, policy):
    gate = layers.BalancedGating(2, E, dtype=policy)
    x = tokens(rng, 9).astype("float16")
    result = gate(x, training=True)
    assert {v.dtype for v in gate.variables} == {"float32"}
    assert result.gates.dtype == result.auxiliary_losses[0].dtype == tf.float32
    assert result.statistics.counts.numpy().tolist() == [3] * E
    logits = x.astype(float) @ gate.gate_kernel.numpy().astype(float)
    softmax_gates = oracle.softmax_gates(logits)
    mask = oracle.batchwise_mask(softmax_gates, 3)
    np.testing.assert_allclose(
        dense(result, 9), oracle.masked_gates(softmax_gates, mask), rtol=1e-5
    )


def make_model():
    inputs = keras.Input((None, D))
    outputs = keras.layers.Dense(1)(make_moe(importance_loss_weight=0.1)(inputs))
    return keras.Model(inputs, outputs)


def test_fit_trains_gate_and_thresholds_then_evaluate_and_predict(rng):
    model = make_model()
    gate = model.layers[1].gating
    before = [gate.gate_kernel.numpy(), gate.thresholds.numpy()]
    x = rng.normal(size=(20, 3, D)).astype("float32")
    y = np.sin(3 * x[..., :1])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    logs = model.fit(x, y, batch_size=4, epochs=3, verbose=0).history
    assert logs["moe_load_cv"] == [0.0, 0.0, 0.0]
    assert logs["moe_max_over_mean_load"] == [1.0, 1.0, 1.0]
    assert logs["loss"][-1] < logs["loss"][0]
    assert np.abs(gate.gate_kernel.numpy() - before[0]).max() > 1e-5
    assert np.abs(gate.thresholds.numpy() - before[1]).max() > 1e-5
    assert model.evaluate(x, y, verbose=0, return_dict=True)["moe_load_cv"] > 0.0
    np.testing.assert_allclose(
        model.predict(x, verbose=0, batch_size=7), model(x), rtol=1e-4, atol=1e-5
    )


def test_keras_file_keeps_the_thresholds(rng, tmp_path):
    model = make_model()
    learned = rng.uniform(0.1, 0.3, size=E)
    model.layers[1].gating.thresholds.assign(learned)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.layers[1].gating.thresholds, learned, rtol=1e-6)
    x = rng.normal(size=(4, 3, D)).astype("float32")
    np.testing.assert_array_equal(loaded(x), model(x))


def test_config_of_every_argument():
    gate = layers.BalancedGating(
        3, 8, threshold_loss_weight=0.5, gate_initializer="glorot_normal"
    )
    copy = layers.BalancedGating.from_config(gate.get_config())
    assert copy.get_config() == gate.get_config()
    assert (copy.k, copy.num_experts, copy.threshold_loss_weight) == (3, 8, 0.5)
    assert isinstance(copy.gate_initializer, keras.initializers.GlorotNormal)


def test_trained_on_fixed_tokens_inference_selects_what_training_selects(rng):
    # The gate stays as it is; only the thresholds are trained, by SGD.
    gate = make_gate()
    x = tokens(rng, 30)
    step = tf.function(lambda: gate(x, training=True).auxiliary_losses[0])
    for i in range(300):
        with tf.GradientTape() as tape:
            loss = step()
        gradient = tape.gradient(loss, gate.thresholds.value)
        gate.thresholds.assign_sub(0.1 / np.sqrt(1.0 + i) * gradient)
    assert gate(x).statistics.counts.numpy().tolist() == [10] * E
    np.testing.assert_allclose(
        dense(gate(x), 30), dense(gate(x, training=True), 30), rtol=1e-6
    )


def test_capacity_is_refused(rng):
    layer = make_moe(capacity_factor=1.0)
    with pytest.raises(ValueError, match=r"capacity_factor=1.0 with BalancedGating"):
        layer(tokens(rng, 5))


@pytest.mark.parametrize("k", [0, -1, 1.5, True, (2, 2), None])
def test_refuses_a_k_that_is_no_positive_int(k):
    with pytest.raises(ValueError, match="`k` must be"):
        layers.BalancedGating(k)


def test_refuses_other_arguments_out_of_range():
    with pytest.raises(ValueError, match="k=5, num_experts=4"):
        layers.BalancedGating(5, 4)
    with pytest.raises(ValueError, match="k=8, num_experts=6"):
        layers.MoE(layers.FeedForwardExperts(6, H), layers.BalancedGating(8))
    with pytest.raises(ValueError, match="threshold_loss_weight=-1"):
        layers.BalancedGating(threshold_loss_weight=-1)
    with pytest.raises(ValueError, match="num_experts=None"):
        layers.BalancedGating().build((None, D))
    with pytest.raises(ValueError, match="rank=3"):
        layers.BalancedGating(2, 4).build((None, 3, D))
