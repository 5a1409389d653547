"""Experts in static slots: the plan, what it computes, and every gradient of it."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

import keras_moe
import keras_moe.functional as F
from keras_moe import operations
from keras_moe.functional import sorting
from tests.helpers import assert_value_and_gradients
from tests.oracles import static_slots as oracle

N, D, E, K, H, OUT = 9, 3, 4, 2, 2, 3


def network(x, *weights):
    return tf.matmul(tf.tanh(tf.matmul(x, weights[0])), weights[1])


def compiled(function, way):
    """The function, run in some way."""
    if way == "eager":
        return function
    return tf.function(function, jit_compile=way == "xla", autograph=False)


WAYS = ["eager", "graph", pytest.param("xla", marks=pytest.mark.slow)]


def routing(load, rng, num_experts=E, k=K, num_tokens=N):
    """`(N, K)` experts."""
    if load == "one expert":
        return np.full((num_tokens, k), num_experts - 1, "int32")
    if load == "none":
        return np.full((num_tokens, k), -1, "int32")
    found = np.stack([rng.permutation(num_experts)[:k] for _ in range(num_tokens)])
    if load == "holes":  # tokens of fewer experts, and of one expert twice
        found[0], found[1, 0], found[2] = -1, -1, found[2, 0]
    elif load == "skewed":
        found[: num_tokens // 2] = np.arange(k)
    return found.astype("int32")


@pytest.mark.parametrize("num_experts", [1, 3, 64, 1000])
def test_sizes_follow_from_shapes_as_documented(num_experts):
    @tf.function
    def in_graph(number):
        return F.slot_sizes(number, num_experts)

    for number in (*range(0, 40), 249, 250, 251, 5000, 131072, 10**6):
        expected = oracle.slot_sizes(number, num_experts)
        assert F.slot_sizes(number, num_experts) == expected
        if expected[0] or not number:
            slots, block = in_graph(tf.constant(number))
            assert (int(slots), int(block)) == expected


@pytest.mark.parametrize("path", ["counted", "sorted"])
@pytest.mark.parametrize("load", ["balanced", "holes", "skewed", "one expert", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("capacity", [None, 0, 2, 100])
def test_a_plan_gives_slots_in_the_order_of_the_tokens(
    monkeypatch, rng, path, load, masked, capacity
):
    if path == "sorted":
        monkeypatch.setattr(sorting, "_MOST_COUNTED", 0)
    experts = routing(load, rng)
    mask = rng.random(N) < 0.6 if masked else None
    plan = F.make_slot_plan(experts, E, mask, capacity, spill=3)
    assert_plan(plan, experts, E, mask, capacity)
    assert plan.spill_rows.numpy().tolist() == [0, 1, 2]


def assert_plan(plan, experts, num_experts, mask=None, capacity=None):
    if capacity is None:
        capacity, _ = oracle.slot_sizes(experts.size, num_experts)
    own = oracle.assignments_of(experts, num_experts, mask)
    positions = np.full(experts.size, -1)
    slots = np.full((num_experts, capacity), -1)
    for expert, assignments in enumerate(own):
        slots[expert, : len(assignments)] = assignments[:capacity]
        for rank, assignment in enumerate(assignments[:capacity]):
            positions[assignment] = expert * capacity + rank
    counts = np.array([len(each) for each in own])
    np.testing.assert_array_equal(plan.assignments, slots)
    np.testing.assert_array_equal(
        plan.token_indices, np.maximum(slots, 0) // max(experts.shape[1], 1)
    )
    np.testing.assert_array_equal(plan.positions, positions.reshape(experts.shape))
    np.testing.assert_array_equal(plan.counts, counts)
    np.testing.assert_array_equal(plan.starts, np.cumsum(counts) - counts)
    np.testing.assert_array_equal(plan.order[: counts.sum()], np.concatenate(own))
    assert int(plan.overflow) == 0


def test_a_plan_of_many_experts(rng):
    experts = routing("balanced", rng, num_experts=600, num_tokens=200)
    assert_plan(F.make_slot_plan(experts, 600), experts, 600)


def test_a_plan_of_more_tokens_than_are_counted_together(rng):
    experts = rng.integers(-1, 5, size=(300, 2)).astype("int32")
    assert_plan(F.make_slot_plan(experts, 5), experts, 5)


@pytest.mark.parametrize(
    "way",
    ["eager", "graph", pytest.param("xla", marks=pytest.mark.slow)],
)
def test_a_plan_of_no_tokens(way):
    def run(experts):
        plan = F.make_slot_plan(experts, E)
        x, weights = tf.zeros((tf.shape(experts)[0], D)), tf.ones((E, D, OUT))
        gates = tf.zeros(tf.shape(experts))
        return F.run_in_slots(tf.matmul, x, plan, [weights], gates=gates), plan.counts

    signature = [tf.TensorSpec((None, K), tf.int32)]
    if way != "eager":
        run = tf.function(run, signature, jit_compile=way == "xla")
    outputs, counts = run(tf.zeros((0, K), tf.int32))
    assert outputs.shape == (0, OUT)
    np.testing.assert_array_equal(counts, np.zeros(E))


@pytest.mark.parametrize(
    ("experts", "options", "found"),
    [
        ([0, 1], {}, r"`expert_indices`.*\(N, K\).*expert_indices.shape=\(2,\)"),
        ([[0, 1]], {"capacity": -1}, "`capacity` must be.*capacity=-1"),
        ([[0, 1]], {"spill": 0}, "`spill` must be.*spill=0"),
    ],
)
def test_a_plan_refuses(experts, options, found):
    with pytest.raises(ValueError, match=found):
        F.make_slot_plan(tf.constant(experts), 2, **options)


def test_a_plan_has_no_tensor_of_all_rows():
    plan = F.make_slot_plan(tf.constant([[0]]), 2)
    with pytest.raises(ValueError, match="no `dispatch`.*SlotPlan.*`mix_experts`"):
        F.dispatch(tf.ones((1, D)), plan)
    with pytest.raises(ValueError, match="no `combine`.*SlotPlan.*`mix_experts`"):
        F.combine(tf.ones((2, 8, D)), tf.ones((1, 1)), plan)


def weights_of(rng, num_experts=E):
    return [
        rng.normal(size=(num_experts, D, H)),
        rng.normal(size=(num_experts, H, OUT)),
    ]


def assert_runs(way, rng, experts, num_experts=E, recompute=False, **sizes):
    """Values and every gradient, with and without gates."""
    x, gates = rng.normal(size=(len(experts), D)), rng.uniform(0.1, 1, experts.shape)
    weights = weights_of(rng, num_experts)

    def run(x, weights, gates=None):
        plan = F.make_slot_plan(experts, num_experts, **sizes)
        return F.run_in_slots(
            network, x, plan, weights, gates=gates, recompute=recompute
        )

    assert_value_and_gradients(
        compiled(lambda x, gates, *weights: run(x, weights, gates), way),
        lambda x, gates, *weights: oracle.mixture(x, gates, experts, weights),
        [x, gates, *weights],
    )
    assert_value_and_gradients(
        compiled(lambda x, *weights: run(x, weights), way),
        lambda x, *weights: oracle.answers(x, experts, weights),
        [x, *weights],
    )


@pytest.mark.parametrize("way", ["eager", "graph"])
@pytest.mark.parametrize("load", ["balanced", "holes", "skewed", "one expert", "none"])
@pytest.mark.parametrize(("capacity", "spill"), [(None, None), (0, 3), (2, 1), (1, 4)])
def test_values_and_gradients_equal_the_oracle(way, rng, load, capacity, spill):
    assert_runs(way, rng, routing(load, rng), capacity=capacity, spill=spill)


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_recomputed(way, rng):
    experts = routing("skewed", rng)
    assert_runs(way, rng, experts, recompute=True, capacity=2, spill=2)


@pytest.mark.slow
@pytest.mark.parametrize("load", ["holes", "one expert"])
@pytest.mark.parametrize(("capacity", "spill"), [(0, 3), (2, 1)])
def test_values_and_gradients_compiled(rng, load, capacity, spill):
    assert_runs("xla", rng, routing(load, rng), capacity=capacity, spill=spill)


@pytest.mark.parametrize("way", WAYS)
def test_many_experts_of_a_token_are_summed_in_place(way, rng):
    experts = routing("balanced", rng, num_experts=18, k=17, num_tokens=3)
    assert_runs(way, rng, experts, 18, capacity=2, spill=1)


def test_gpu_operations_change_nothing(rng):
    with keras_moe.serving.gpu_operations():
        assert_runs("graph", rng, routing("skewed", rng), capacity=2, spill=2)


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_second_gradients_equal_those_of_a_sorted_plan(way, rng):
    experts = routing("skewed", rng)
    arrays = [rng.normal(size=(N, D)), rng.random((N, K)), *weights_of(rng)]

    def second(plan_of):
        def run(*tensors):
            with tf.GradientTape() as outer:
                outer.watch(tensors)
                with tf.GradientTape() as inner:
                    inner.watch(tensors)
                    x, gates, *weights = tensors
                    y = F.mix_experts(network, x, gates, plan_of(), weights)
                    total = tf.reduce_sum(y**2)
                first = inner.gradient(total, tensors)
                total = tf.add_n([tf.reduce_sum(each**2) for each in first])
            return outer.gradient(total, tensors)

        return compiled(run, way)(*map(tf.constant, arrays))

    expected = second(lambda: F.make_dispatch_plan(experts, E))
    found = second(lambda: F.make_slot_plan(experts, E, capacity=2, spill=2))
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("capacity", [0, 2, 100])
def test_nan_stays_in_its_row(rng, capacity):
    experts = routing("one expert", rng)
    plan = F.make_slot_plan(experts, E, capacity=capacity, spill=2)
    x = rng.normal(size=(N, D))
    x[3] = np.nan
    x, weights = tf.constant(x), [tf.constant(each) for each in weights_of(rng)]
    gates = tf.ones((N, K), tf.float64)
    with tf.GradientTape() as tape:
        tape.watch([x, gates])
        y = F.run_in_slots(network, x, plan, weights, gates=gates)
    others = np.arange(N) != 3
    for found in (y, *tape.gradient(y, [x, gates])):
        assert np.isfinite(found.numpy()[others]).all()
    assert np.isnan(y.numpy()[3]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_in_a_graph(rng, dtype):
    experts = routing("skewed", rng)
    arrays = [rng.normal(size=(N, D)), rng.random((N, K)), *weights_of(rng)]

    @tf.function
    def run(x, gates, *weights):
        plan = F.make_slot_plan(experts, E, capacity=2, spill=2)
        with tf.GradientTape() as tape:
            tape.watch([x, gates, *weights])
            y = F.run_in_slots(network, x, plan, weights, gates=gates)
        return y, tape.gradient(y, [x, gates, *weights])

    found, gradients = run(*(tf.cast(array, dtype) for array in arrays))
    wanted, expected = run(*map(tf.constant, arrays))
    for ours, exact in zip((found, *gradients), (wanted, *expected), strict=True):
        assert ours.dtype == dtype
        apart = np.linalg.norm(tf.cast(ours, tf.float64) - exact)
        # 2**-8 is what a sum of few terms may be off by in bfloat16.
        assert apart < 4 * 2**-8 * np.linalg.norm(exact)


TOP_K = {
    "random": lambda rng: rng.normal(size=(7, 5)),
    "ties": lambda rng: rng.integers(0, 2, size=(7, 5)).astype("float64"),
    "equal": lambda rng: np.zeros((2, 5)),
    "a row of NaN": lambda rng: np.where([[True], [False]], np.nan, np.ones((2, 5))),
    "minus infinity": lambda rng: np.where(
        rng.random((7, 5)) < 0.7, -np.inf, rng.normal(size=(7, 5))
    ),
    "infinity": lambda rng: np.array([[1, np.inf, 2, np.inf, 0]]),
}


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("case", TOP_K)
def test_top_k_is_that_of_tensorflow(rng, case, k):
    values = tf.constant(TOP_K[case](rng), tf.float32)
    weights = tf.constant(rng.normal(size=(len(values), k)), tf.float32)
    results = []
    for kind in (operations.Operations(), operations.StaticOperations()):
        with tf.GradientTape() as tape:
            tape.watch(values)
            best, indices = kind.top_k(values, k)
        results.append((best, indices, tape.gradient(best, values, weights)))
    for found, wanted in zip(results[1], results[0], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_candidates_are_the_first_to_arrive(rng):
    size, number = 30, 6
    uniform = rng.random(size)
    ranks = np.arange(1, size + 1)
    p = (np.log(ranks + 1) - np.log(ranks)) / np.log(size + 1)
    arrivals = -np.log(1 - uniform) / p
    order = np.argsort(arrivals)
    expected = 1 - np.exp(-p[order[:number]] * arrivals[order[number]])
    candidates, counts = F.log_uniform_candidates(tf.constant(uniform), number)
    np.testing.assert_array_equal(candidates, order[:number])
    np.testing.assert_allclose(counts, expected, rtol=1e-9)


def test_a_sum_over_candidates_estimates_that_over_all_words(rng):
    size, number, draws = 40, 10, 4000
    values = rng.normal(size=size) + 1.0

    @tf.function
    def estimate(uniform):
        candidates, counts = F.log_uniform_candidates(uniform, number)
        return tf.reduce_sum(tf.gather(values, candidates) / counts)

    uniform = tf.constant(rng.random((draws, size)))
    found = tf.function(lambda u: tf.map_fn(estimate, u))(uniform).numpy()
    error = found.std(ddof=1) / np.sqrt(draws)
    assert abs(found.mean() - values.sum()) < 4 * error
    assert error < 0.02 * values.sum()  # so small that a bias would be seen


def test_the_sampled_softmax_is_the_same_on_gpus(rng):
    arrays = [rng.normal(size=(6, D)), rng.normal(size=(12, D)), rng.normal(size=12)]
    targets, candidates = np.array([0, 1, 5, 11, 5, 2]), tf.constant([0, 5, 3, 7])
    counts = tf.constant([0.9, 0.3, 0.5, 0.2], tf.float64)
    results = []
    for where in (contextlib.nullcontext(), keras_moe.serving.gpu_operations()):
        tensors = [tf.constant(array) for array in arrays]
        with where, tf.GradientTape() as tape:
            tape.watch(tensors)
            losses = F.sampled_cross_entropy(*tensors, targets, candidates, counts)
        weights = np.arange(1.0, 7.0)
        gradients = tape.gradient(losses, tensors, tf.constant(weights))
        results.append([losses, *map(tf.convert_to_tensor, gradients)])
    for found, wanted in zip(results[1], results[0], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
