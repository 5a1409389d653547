import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients, dense_gates
from tests.oracles import mixture as oracle

N, D, E, K, H = 9, 5, 6, 2, 4


@pytest.fixture
def case(rng):
    indices = np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype("int32")
    return {
        "x": rng.normal(size=(N, D)),
        "gates": rng.uniform(0.1, 1.0, size=(N, K)),
        "indices": indices,
        "kernels": [rng.normal(size=(E, D, H)), rng.normal(size=(E, H, D))],
    }


def plan_of(kind, indices):
    n, k = indices.shape
    if kind == "dropless":
        return F.make_dispatch_plan(indices, E)
    if kind == "ragged":
        return F.make_dispatch_plan(indices.reshape(-1), E, np.repeat(np.arange(n), k))
    return F.make_capacity_plan(indices, E, n)


def mix(plan, x, gates, *kernels, **way):
    expert_inputs = F.dispatch(x, plan)
    outputs = F.feed_forward_experts(expert_inputs, kernels, None, plan.counts, **way)
    if plan.positions.shape.rank == 1:
        gates = tf.reshape(gates, [-1])
    return F.combine(outputs, gates, plan, num_tokens=tf.shape(x)[0])


@pytest.fixture(params=["unrolled", "blocks", "chosen"])
def way(request):
    """All ways to compute sorted rows, whatever the number of experts."""
    return {"computation": request.param}


@pytest.mark.parametrize("kind", ["dropless", "ragged", "capacity"])
def test_dispatch_experts_combine_equal_oracle(way, case, kind):
    plan = plan_of(kind, case["indices"])
    assert_value_and_gradients(
        lambda x, g, *w: mix(plan, x, g, *w, **way),
        lambda x, g, *w: oracle.mixture(x, dense_gates(g, case["indices"], E), w),
        [case["x"], case["gates"], *case["kernels"]],
    )


@pytest.mark.parametrize(
    "counts",
    [
        [2, 0, 3, 1, 0, 1],  # some idle
        [2, 2, 2, 2, 2, 1],  # balanced: blocks lie where the kernels do
        [0, 0, 9, 0, 0, 0],  # all rows to one expert
        [0, 0, 0, 1, 0, 0],  # fewer rows than experts
        [0, 0, 0, 0, 0, 0],
    ],
)
def test_several_hidden_layers_with_biases_equal_oracle(way, rng, counts):
    sizes = [D, 4, 3, 2]
    kernels = [
        rng.normal(size=(E, a, b)) for a, b in zip(sizes, sizes[1:], strict=False)
    ]
    biases = [rng.normal(size=(E, b)) for b in sizes[1:]]
    rows = rng.normal(size=(sum(counts), D))
    owner = np.repeat(np.arange(E), counts)

    def expected(x, *weights):
        w, b = weights[:3], weights[3:]
        return np.array(
            [
                oracle.feed_forward(row, [k[e] for k in w], [c[e] for c in b], np.tanh)
                for row, e in zip(x, owner, strict=True)
            ]
        ).reshape(len(x), 2)

    assert_value_and_gradients(
        lambda x, *w: F.feed_forward_experts(x, w[:3], w[3:], counts, tf.tanh, **way),
        expected,
        [rows, *kernels, *biases],
    )


def test_dropless_plan_of_a_worked_example():
    # Token 0 -> experts 2, 0; token 1 -> experts 0, 1. Sorted by expert:
    # row 0: expert 0 token 0; row 1: expert 0 token 1; row 2: expert 1 token 1;
    # row 3: expert 2 token 0.
    plan = F.make_dispatch_plan([[2, 0], [0, 1]], 4)
    np.testing.assert_array_equal(plan.token_indices, [0, 1, 1, 0])
    np.testing.assert_array_equal(plan.counts, [2, 1, 1, 0])
    np.testing.assert_array_equal(plan.positions, [[3, 0], [1, 2]])
    assert int(plan.overflow) == 0


def test_capacity_plan_of_a_worked_example():
    # One slot each. First choices: token 0 -> 1, token 1 -> 1, token 2 -> 0.
    # Second choices: token 0 -> 0, token 1 -> 2, token 2 -> 2.
    # Expert 1 takes token 0 and drops token 1; expert 0 takes token 2 (first
    # choice) and drops token 0 (second choice); expert 2 takes token 1.
    plan = F.make_capacity_plan([[1, 0], [1, 2], [0, 2]], 3, 1)
    np.testing.assert_array_equal(plan.token_indices, [[2], [0], [1]])
    np.testing.assert_array_equal(plan.positions, [[1, -1], [-1, 2], [0, -1]])
    np.testing.assert_array_equal(plan.counts, [1, 1, 1])
    assert int(plan.overflow) == 3


def test_dropped_assignments_add_exactly_zero():
    plan = F.make_capacity_plan([[0], [0]], 2, 1)
    rows = tf.constant([[[5.0]], [[7.0]]])
    outputs = F.combine(rows, tf.ones((2, 1)), plan)
    np.testing.assert_array_equal(outputs, [[5.0], [0.0]])


def test_masked_tokens_take_no_slot_and_are_not_counted():
    mask = np.array([False, True, True])
    plan = F.make_capacity_plan([[0], [0], [1]], 2, 1, mask)
    np.testing.assert_array_equal(plan.token_indices, [[1], [2]])
    np.testing.assert_array_equal(plan.positions, [[-1], [0], [1]])
    assert int(plan.overflow) == 0


@pytest.mark.parametrize(
    ("tokens", "factor", "expected"),
    # ceil(factor * k * N / E) with k=2, E=4, at least 1 and at most N.
    [(8, 1.0, 4), (8, 1.1, 5), (1, 0.1, 1), (3, 100.0, 3), (0, 1.0, 1), (7, 1.0, 4)],
)
def test_expert_capacity(tokens, factor, expected):
    assert int(F.expert_capacity(tokens, 4, 2, factor)) == expected


@pytest.mark.parametrize("factor", [0.0, -1.0, np.nan])
def test_expert_capacity_refuses_a_bad_factor(factor):
    with pytest.raises(ValueError, match="`capacity_factor`"):
        F.expert_capacity(4, 2, 1, factor)


@pytest.mark.parametrize("kind", ["dropless", "ragged", "capacity"])
def test_identity_experts_return_the_inputs(case, kind):
    plan = plan_of(kind, case["indices"])
    gates = tf.constant(np.full((N, K), 1 / K))
    identity = np.repeat(np.eye(D)[None], E, axis=0)
    np.testing.assert_allclose(
        mix(plan, tf.constant(case["x"]), gates, identity), case["x"], rtol=1e-12
    )


def test_permuting_tokens_permutes_outputs(case, rng):
    order = rng.permutation(N)
    kernels = case["kernels"]
    plain = mix(
        plan_of("dropless", case["indices"]), case["x"], case["gates"], *kernels
    )
    moved = mix(
        plan_of("dropless", case["indices"][order]),
        case["x"][order],
        case["gates"][order],
        *kernels,
    )
    np.testing.assert_allclose(moved, plain.numpy()[order], rtol=1e-12)


def test_permuting_experts_changes_nothing(case, rng):
    order = rng.permutation(E)
    renamed = np.argsort(order)[case["indices"]].astype("int32")
    plain = mix(
        plan_of("dropless", case["indices"]), case["x"], case["gates"], *case["kernels"]
    )
    moved = mix(
        plan_of("dropless", renamed),
        case["x"],
        case["gates"],
        *[kernel[order] for kernel in case["kernels"]],
    )
    np.testing.assert_allclose(moved, plain, rtol=1e-12)


@pytest.mark.parametrize("kind", ["dropless", "ragged", "capacity"])
def test_zero_tokens(kind):
    plan = (
        plan_of(kind, np.zeros((0, K), "int32"))
        if kind != "capacity"
        else (F.make_capacity_plan(np.zeros((0, K), "int32"), E, 1))
    )
    kernel = tf.ones((E, D, 3))
    outputs = mix(plan, tf.zeros((0, D)), tf.zeros((0, K)), kernel)
    assert outputs.shape == (0, 3)


def test_the_graph_of_many_experts_does_not_grow_with_their_number():
    sizes = []
    for num_experts in (300, 3000):
        kernels = [tf.ones((num_experts, 2, 3))]

        @tf.function
        def run(x, counts, kernels=kernels):
            return F.feed_forward_experts(x, kernels, None, counts)

        graph = run.get_concrete_function(
            tf.TensorSpec((None, 2)), tf.TensorSpec((num_experts,), tf.int32)
        ).graph
        sizes.append(len(graph.get_operations()))
    assert abs(sizes[0] - sizes[1]) < 5


def test_blocks_in_a_graph_equal_single_experts_whatever_the_balance(rng):
    # Skewed and balanced counts through one traced function: the choice of
    # blocks is made when it runs.
    kernels = [tf.constant(rng.normal(size=(E, D, D)))]

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, D), tf.float64),
            tf.TensorSpec((E,), tf.int32),
        ]
    )
    def run(x, counts):
        with tf.GradientTape() as tape:
            tape.watch([x, *kernels])
            y = F.feed_forward_experts(x, kernels, None, counts, computation="blocks")
        return y, *tape.gradient(y, [x, *kernels])

    for counts in (
        [3, 3, 3, 3, 3, 3],
        [0, 11, 1, 0, 2, 0],
        [0, 0, 0, 0, 0, 1],
        [0] * 6,
    ):
        x = rng.normal(size=(sum(counts), D))
        y, d_x, d_kernel = run(x, tf.constant(counts))
        owner = np.repeat(np.arange(E), counts)
        kernel = kernels[0].numpy()
        np.testing.assert_allclose(
            y, np.einsum("md,mdh->mh", x, kernel[owner]), atol=1e-9
        )
        np.testing.assert_allclose(d_x, kernel[owner].sum(axis=2), atol=1e-9)
        expected = np.zeros_like(kernel)
        for row, e in zip(x, owner, strict=True):
            expected[e] += row[:, None]
        np.testing.assert_allclose(d_kernel, expected, atol=1e-9)


def test_all_tokens_to_one_expert(way, case):
    indices = np.full((N, 1), 3, "int32")
    plan = F.make_dispatch_plan(indices, E)
    outputs = mix(plan, case["x"], np.ones((N, 1)), case["kernels"][0], **way)
    np.testing.assert_allclose(outputs, case["x"] @ case["kernels"][0][3], rtol=1e-12)


def test_an_expert_whose_gate_underflows_still_gets_its_token():
    gates, indices = F.top_k_gating(tf.constant([[0.0, -200.0, -300.0]]), 2)
    assert gates.numpy()[0, 1] == 0.0
    result = F.make_gating_result(gates, indices, 3)
    np.testing.assert_array_equal(F.make_plan(result).counts, [1, 1, 0])
    np.testing.assert_array_equal(result.statistics.counts, [1, 1, 0])


def test_positions_are_exact_beyond_what_half_and_single_precision_hold():
    n = 70_000
    plan = F.make_dispatch_plan(tf.zeros((n, 1), tf.int32), 2)
    np.testing.assert_array_equal(plan.positions[:, 0], np.arange(n))
    plan = F.make_capacity_plan(tf.zeros((n, 1), tf.int32), 2, n)
    np.testing.assert_array_equal(plan.positions[:, 0], np.arange(n))


def test_tokens_without_any_expert_get_zero():
    # Tokens 0, 2 and 4 have no expert, at the start, in the middle, at the end.
    plan = F.make_dispatch_plan([1, 0, 1], 2, [1, 1, 3])
    x = tf.constant([[1.0], [2.0], [3.0], [4.0], [5.0]])
    kernel = tf.constant([[[10.0]], [[100.0]]])
    outputs = mix(plan, x, tf.constant([0.5, 0.25, 1.0]), kernel)
    # Token 1: 0.5 * 2 * 100 + 0.25 * 2 * 10 = 105; token 3: 4 * 100.
    np.testing.assert_allclose(outputs[:, 0], [0.0, 105.0, 0.0, 400.0, 0.0])


def test_combine_is_deterministic(case):
    plan = plan_of("dropless", case["indices"])
    runs = {
        mix(plan, case["x"], case["gates"], *case["kernels"]).numpy().tobytes()
        for _ in range(5)
    }
    assert len(runs) == 1


def test_importance_counts_and_load_of_a_gating_result():
    mask = np.array([True, False])
    result = F.make_gating_result(
        tf.constant([[0.75, 0.25], [0.5, 0.5]]),
        tf.constant([[0, 2], [1, 2]]),
        3,
        mask=mask,
    )
    np.testing.assert_allclose(result.statistics.importance, [0.75, 0.0, 0.25])
    np.testing.assert_array_equal(result.statistics.counts, [1, 0, 1])
    np.testing.assert_allclose(result.statistics.load, [1.0, 0.0, 1.0])


def test_unknown_number_of_tokens_in_a_graph(case):
    @tf.function(
        input_signature=[
            tf.TensorSpec((None, D), tf.float64),
            tf.TensorSpec((None, K), tf.float64),
            tf.TensorSpec((None, K), tf.int32),
        ]
    )
    def run(x, gates, indices):
        return mix(F.make_dispatch_plan(indices, E), x, gates, *case["kernels"])

    for n in (N, 1, 0):
        outputs = run(case["x"][:n], case["gates"][:n], case["indices"][:n])
        dense = dense_gates(case["gates"][:n], case["indices"][:n], E)
        np.testing.assert_allclose(
            outputs, oracle.mixture(case["x"][:n], dense, case["kernels"]), rtol=1e-9
        )


def test_capacity_plan_compiles_with_xla(case):
    def run(x, gates, indices):
        capacity = F.expert_capacity(tf.shape(x)[0], E, K, E / K)
        plan = F.make_capacity_plan(indices, E, capacity)
        return mix(plan, x, gates, *case["kernels"])

    inputs = (case["x"], case["gates"], case["indices"])
    compiled = tf.function(run, jit_compile=True)(*map(tf.constant, inputs))
    np.testing.assert_allclose(compiled, run(*inputs), rtol=1e-9)


def test_experts_need_counts_for_sorted_rows():
    with pytest.raises(ValueError, match="counts=None"):
        F.feed_forward_experts(tf.ones((3, D)), [tf.ones((E, D, H))])


def test_plans_refuse_wrong_ranks():
    with pytest.raises(ValueError, match="token_indices=None"):
        F.make_dispatch_plan([0, 1], 2)
    with pytest.raises(ValueError, match=r"shape=\(2, 1\)"):
        F.make_dispatch_plan([[0], [1]], 2, [0, 1])
    with pytest.raises(ValueError, match=r"shape=\(2,\)"):
        F.make_capacity_plan([0, 1], 2, 1)


def test_combine_needs_the_number_of_tokens_of_a_ragged_plan():
    plan = F.make_dispatch_plan([0, 1], 2, [0, 0])
    with pytest.raises(ValueError, match="num_tokens=None"):
        F.combine(tf.ones((2, 1)), tf.ones(2), plan)
