import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import layers, serving
from tests.oracles import mixture as dense_oracle
from tests.oracles import routers as oracle

D, E, H = 4, 6, 5
FACTOR = {"capacity_factor": float(E), "evaluation_capacity_factor": float(E)}


def make_moe(policy="random", dtype=None, seed=3, **kwargs):
    experts = layers.FeedForwardExperts(E, H, dtype=dtype)
    gating = layers.GShardGating(
        second_policy=policy, second_threshold=0.4, seed=seed, dtype=dtype
    )
    layer = layers.MoE(experts, gating, dtype=dtype, **kwargs)
    layer.build((None, D))
    return layer


def tokens(rng, n):
    return rng.normal(size=(n, D)).astype("float32")


def expected_gates(layer, x, uniform=None):
    logits = (x @ layer.gating.gate_kernel.numpy()).astype("float64")
    gating = layer.gating
    policy = gating.second_policy
    if policy == "random" and uniform is None:
        policy = "all"
    return oracle.second_choice(logits, policy, uniform, gating.second_threshold)


@pytest.mark.parametrize("policy", ["all", "random", "threshold"])
@pytest.mark.parametrize("options", [{}, FACTOR], ids=["dropless", "capacity"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_moe_equals_dense_enumeration(rng, policy, options, static, training):
    layer = make_moe(policy, **options)
    x = tokens(rng, 30)
    uniform = None
    if training and policy == "random":
        uniform = keras.random.uniform((30, 1), seed=keras.random.SeedGenerator(3))
        uniform = uniform.numpy()[:, 0]
    kernels = [v.numpy() for v in layer.experts.trainable_variables]
    gates = expected_gates(layer, x, uniform)
    expected = dense_oracle.mixture(x, gates, kernels)

    def run():
        return layer(x, training=training)

    if static:
        with serving.gpu_operations():
            outputs = tf.function(run, autograph=False)()
    else:
        outputs = run()
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    counts = layer.balance.counts().numpy()
    if training:  # no work for a second expert that is not used
        np.testing.assert_array_equal(counts, (gates > 0).sum(axis=0))
        assert (counts.sum() < 60) == (policy != "all")


def test_padding_draws_no_lot_and_is_not_counted(rng):
    x = rng.normal(size=(3, 6, D)).astype("float32")
    mask = np.arange(6) < np.array([[6], [3], [0]])
    outputs, counts = [], []
    for options, inputs, kept in (
        ({}, x[mask], None),
        ({}, x, mask),
        (FACTOR, x, mask),
    ):
        keras.utils.set_random_seed(0)
        layer = make_moe(**options)
        found = layer(inputs, mask=kept, training=True).numpy()
        outputs.append(found if kept is None else found[mask])
        counts.append(layer.balance.counts().numpy())
    for found, numbers in zip(outputs[1:], counts[1:], strict=True):
        np.testing.assert_allclose(found, outputs[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(numbers, counts[0])


def test_with_a_capacity_second_choices_are_dropped_first():
    # Every token likes expert 1 best and expert 0 second, or the other way round.
    gate = layers.GShardGating(2, second_policy="threshold", second_threshold=0.1)
    layer = layers.MoE(layers.FeedForwardExperts(2, H), gate, capacity_factor=0.5)
    layer.build((None, 2))
    gate.gate_kernel.assign(np.eye(2))
    x = np.array([[0.0, 1.0], [1.0, 0.0]], "float32").repeat(4, axis=0)
    result = gate(x, training=True)
    assert result.is_ragged
    dispatcher = F.CapacityDispatcher(0.5, gate.most_experts)
    plan = dispatcher.make_plan(F.dispatching.in_columns(result, 8, 2), None)
    # ceil(0.5 * 2 * 8 / 2) = 4 slots each, taken by the first choices.
    assert plan.token_indices.numpy().tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert int(plan.overflow) == 8
    assert np.isfinite(layer(x, training=True)).all()


def test_losses_are_the_papers_and_a_z_loss(rng):
    gate = layers.GShardGating(
        E, second_policy="all", switch_loss_weight=0.5, z_loss_weight=0.1
    )
    x = tokens(rng, 20)
    mask = rng.random(20) < 0.7
    z_loss, loss = gate(x, mask=mask, training=True).auxiliary_losses
    logits = (x[mask] @ gate.gate_kernel.numpy()).astype("float64")
    probabilities = oracle.scores(logits, "softmax")
    first = np.bincount(logits.argmax(axis=1), minlength=E)
    expected = 0.5 * dense_oracle.switch_loss(probabilities, first)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    expected = 0.1 * dense_oracle.router_z_loss(logits)
    assert float(z_loss) == pytest.approx(expected, rel=1e-5)
    assert gate(x, mask=mask).auxiliary_losses == ()


@pytest.mark.parametrize("kind", ["LossFreeGating", "ExpertChoiceGating"])
def test_its_neighbors_take_a_z_loss_too(rng, kind):
    gate = getattr(layers, kind)(2, E, z_loss_weight=0.1)
    x = tokens(rng, 20)
    (loss,) = gate(x, training=True).auxiliary_losses
    logits = (x @ gate.gate_kernel.numpy()).astype("float64")
    expected = 0.1 * dense_oracle.router_z_loss(logits)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_lots_differ_between_calls_and_follow_the_seed(rng):
    x = tokens(rng, 50)
    gate = layers.GShardGating(E, seed=1)
    first, second = (gate(x, training=True).token_indices.numpy() for _ in range(2))
    assert first.shape != second.shape or (first != second).any()
    again = layers.GShardGating(E, seed=1)
    again.build((None, D))
    again.gate_kernel.assign(gate.gate_kernel)
    np.testing.assert_array_equal(again(x, training=True).token_indices, first)
    # None at inference, whose gates are (N, 2).
    assert gate(x).gates.shape == (50, 2)


def test_gradients_reach_the_gate_through_both_experts(rng):
    layer = make_moe(importance_loss_weight=0.0)
    x = tokens(rng, 30)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(tf.sin(layer(x, training=True)))
    gradient = tape.gradient(total, layer.gating.gate_kernel.value)
    assert np.abs(gradient).max() > 1e-4


def test_as_the_primary_gate_of_groups(rng):
    gate = layers.GShardGating(seed=1)
    layer = layers.HierarchicalMoE(
        layers.FeedForwardExperts(8, H), 4, k=(2, 2), primary_gating=gate
    )
    x = tokens(rng, 30)
    layer.build((None, D))
    state = gate.seed_generator.state.numpy()
    outputs = layer(x, training=True)
    counts = layer.balance.counts().numpy()
    assert 60 < counts.sum() < 120  # both experts of one group or two
    gate.seed_generator.state.assign(state)
    layer.balance.reset_state()
    with serving.gpu_operations():
        static = tf.function(lambda: layer(x, training=True), autograph=False)()
    np.testing.assert_array_equal(layer.balance.counts(), counts)
    # The secondary noise of a group without experts is drawn there and not here.
    assert np.isfinite(outputs).all()
    assert np.isfinite(static).all()


def test_in_a_recurrence_both_experts_are_always_used():
    with pytest.raises(ValueError, match="second_policy='random'"):
        layers.MoELSTM(4, E, layers.GShardGating(switch_loss_weight=0.0))
    gate = layers.GShardGating(switch_loss_weight=0.0, second_policy="all")
    assert layers.MoELSTM(4, E, gate)(np.ones((2, 3, D), "float32")).shape == (2, 4)


def test_what_cannot_be_is_refused():
    for options, message in (
        ({"second_policy": "none"}, "second_policy='none'"),
        ({"second_threshold": 1.0}, "second_threshold=1.0"),
        ({"num_experts": 1}, "k=2, num_experts=1"),
        ({"switch_loss_weight": -1}, "switch_loss_weight=-1"),
        ({"k": 2}, "`k` of GShardGating is fixed: 2. Received: k=2"),
        ({"normalization": "all"}, "`normalization` of GShardGating is fixed"),
    ):
        with pytest.raises(ValueError, match=message):
            layers.GShardGating(**{"num_experts": 4, **options})
