"""One oracle for every dispatcher of one device, and what gates and plans promise."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import layers, types
from tests.helpers import assert_value_and_gradients, dense_gates
from tests.oracles import mixture as oracle

N, D, E, K, H = 9, 5, 6, 2, 4
KINDS = {"dropless": F.Dispatcher, "capacity": lambda: F.CapacityDispatcher(E / K)}


@pytest.fixture
def case(rng):
    indices = np.stack([rng.permutation(E - 1)[:K] for _ in range(N)]).astype("int32")
    return {
        "x": rng.normal(size=(N, D)),
        "gates": rng.uniform(0.1, 1.0, size=(N, K)),
        "indices": indices,
        "kernels": [rng.normal(size=(E, D, H)), rng.normal(size=(E, H, D))],
    }


class Loops:
    """Experts as any layer may be them: rows and counts, no plan."""

    compute_dtype = "float64"

    def __init__(self, kernels):
        self.kernels = kernels

    def call(self, inputs, counts=None):
        parts = tf.split(inputs, counts) if inputs.shape.rank == 2 else inputs
        outputs = []
        for e in range(E):
            hidden = tf.nn.relu(tf.matmul(parts[e], self.kernels[0][e]))
            outputs.append(tf.matmul(hidden, self.kernels[1][e]))
        return tf.concat(outputs, 0) if inputs.shape.rank == 2 else tf.stack(outputs)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], D)

    __call__ = call


class Fused(Loops):
    """Experts that take the plan."""

    def call(self, inputs, counts=None, gates=None, plan=None):
        network = F.feed_forward_network(2, tf.nn.relu)
        return F.mix_experts(network, inputs, gates, plan, self.kernels)

    __call__ = call


class Stacked(Fused):
    """Experts whose weights a loop can go over."""

    @property
    def stacked_weights(self):
        return self.kernels


@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        *((kind, experts) for kind in KINDS for experts in (Loops, Fused)),
        ("static", Loops),
        ("static", Stacked),
    ],
)
def test_every_dispatcher_equals_the_oracle(case, kind, experts):
    def mix(x, gates, *kernels):
        result = F.make_gating_result(gates, case["indices"], E)
        make = KINDS.get(kind, F.StaticDispatcher)
        mixed = make().mix(experts(kernels), x, result)
        assert int(mixed.overflow) == 0
        return mixed.outputs

    assert_value_and_gradients(
        mix,
        lambda x, g, *w: oracle.mixture(x, dense_gates(g, case["indices"], E), w),
        [case["x"], case["gates"], *case["kernels"]],
    )


def test_tokens_with_different_numbers_of_experts(case):
    # The second half of the tokens has its first expert only.
    keep = np.ones((N, K), bool)
    keep[N // 2 :, 1] = False
    tokens = np.nonzero(keep)[0].astype("int32")

    def mix(x, gates, *kernels):
        result = F.make_gating_result(
            gates[keep], case["indices"][keep], E, token_indices=tokens
        )
        assert result.is_ragged
        assert isinstance(F.make_plan(result), F.RaggedPlan)
        return F.Dispatcher().mix(Loops(kernels), x, result).outputs

    assert_value_and_gradients(
        mix,
        lambda x, g, *w: oracle.mixture(
            x, dense_gates(g * keep, case["indices"], E), w
        ),
        [case["x"], case["gates"], *case["kernels"]],
    )


def test_a_capacity_leaves_masked_tokens_out_and_counts_what_it_drops(case):
    mask = np.arange(N) < 4
    result = F.make_gating_result(np.ones((N, 1)), np.zeros((N, 1), "int32"), E)
    # Of 4 real tokens expert 0 may have ceil(3 * 1 * 4 / 6) = 2.
    plan = F.CapacityDispatcher(3.0).make_plan(result, mask)
    assert plan.counts.numpy().tolist() == [2, 0, 0, 0, 0, 0]
    assert int(plan.overflow) == 2
    # Of all 9 it may have ceil(3 * 1 * 9 / 6) = 5, and shapes are for those.
    plan_of_all = F.CapacityDispatcher(3.0).make_plan(result, None)
    assert int(plan_of_all.overflow) == 4
    assert plan.token_indices.shape == plan_of_all.token_indices.shape == (E, 5)


def test_a_capacity_refuses_different_numbers_of_experts(case):
    result = F.make_gating_result(
        np.ones(3), np.zeros(3, "int32"), E, token_indices=np.array([0, 1, 1])
    )
    with pytest.raises(ValueError, match=r"`capacity_factor` needs .*=1\.5 with"):
        F.CapacityDispatcher(1.5).make_plan(result, None)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("computation", ["unrolled", "blocks"])
def test_run_experts_of_any_network_equals_loops(case, computation, recompute):
    counts = np.array([2, 0, 3, 1, 0, 3])
    owner = np.repeat(np.arange(E), counts)

    def network(rows, kernel, bias):
        return tf.nn.tanh(tf.matmul(rows, kernel) + bias[:, tf.newaxis])

    def run(x, kernel, bias):
        return F.run_experts(
            network,
            x,
            [kernel, bias],
            counts,
            recompute=recompute,
            computation=computation,
        )

    def expected(x, kernel, bias):
        return np.tanh(np.einsum("md,mdh->mh", x, kernel[owner]) + bias[owner])

    bias = np.linspace(-1, 1, E * H).reshape(E, H)
    assert_value_and_gradients(run, expected, [case["x"], case["kernels"][0], bias])


def test_the_default_computation_depends_on_number_and_device():
    assert F.default_computation(256, "CPU") == "unrolled"
    assert F.default_computation(257, "CPU") == "blocks"
    assert F.default_computation(2, "GPU") == "blocks"
    with pytest.raises(ValueError, match=r"`computation` must be .*'sorted'"):
        layers.FeedForwardExperts(4, 8, computation="sorted")


def test_the_plan_of_a_result_is_deprecated_and_still_right(case):
    result = F.make_gating_result(case["gates"], case["indices"], E)
    with pytest.warns(DeprecationWarning, match=r"make_plan\(result\)"):
        plan = result.plan
    assert isinstance(plan, types.DispatchPlan)
    for field in ("token_indices", "counts", "positions", "expert_indices"):
        np.testing.assert_array_equal(
            getattr(plan, field), getattr(F.make_plan(result), field)
        )


def test_a_gate_that_makes_its_result_of_a_plan_still_works(case):
    """As gates could before there were dispatchers."""

    class OldGate(keras.layers.Layer):
        num_experts = None

        def call(self, inputs, mask=None, training=None):
            chosen = tf.zeros_like(inputs[:, :2], tf.int32) + np.array([1, 3])
            gates = tf.ones_like(inputs[:, :2])
            new = F.make_gating_result(gates, chosen, self.num_experts)
            plan = F.make_dispatch_plan(chosen, self.num_experts)
            return types.GatingResult(gates, plan, new.statistics)

    layer = layers.MoE(layers.FeedForwardExperts(E, H), OldGate())
    x = tf.constant(case["x"], tf.float32)
    with pytest.warns(DeprecationWarning, match="make_gating_result"):
        y = layer(x)
    weights = layer.experts.get_weights()
    dense = np.zeros((N, E))
    dense[:, [1, 3]] = 1.0
    np.testing.assert_allclose(y, oracle.mixture(case["x"], dense, weights), atol=1e-5)


def test_an_old_ragged_plan_keeps_its_tokens():
    tokens = np.array([0, 0, 2], "int32")
    plan = F.make_dispatch_plan([2, 0, 1], 3, tokens)
    with pytest.warns(DeprecationWarning, match="make_gating_result"):
        result = types.GatingResult(np.ones(3), plan, None)
    np.testing.assert_array_equal(result.token_indices, tokens)
