import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from tests.helpers import assert_value_and_gradients
from tests.oracles import mixture
from tests.oracles import recurrent as oracle

T, B, D, U, E, K = 4, 2, 2, 2, 4, 2
STDDEV = 0.3


def route(u, noise, mask, gate_kernel):
    clean = tf.matmul(u, gate_kernel)
    noisy = clean if noise is None else clean + STDDEV * noise
    gates, experts = F.top_k_gating(noisy, K)
    load = None
    if noise is not None:
        stddev = STDDEV * tf.ones_like(clean)
        load = F.load(F.prob_in_top_k(clean, noisy, stddev, K), mask)
    return F.make_gating_result(
        gates, experts, gate_kernel.shape[1], load=load, mask=mask
    )


@pytest.fixture
def case(rng):
    shapes = [(T, B, D), (B, U), (B, U), (E, D + U, 4 * U), (4 * U,), (D + U, E)]
    arrays = [rng.normal(size=shape) for shape in shapes]
    mask = np.array([[1, 1], [1, 0], [0, 1], [1, 1]], bool)
    return arrays, rng.normal(size=(T, B, E)), mask


def flat(hidden, h, c, importance, load):
    """All results in one array, each with a weight of its own later."""
    parts = (hidden, h, c, importance, load)
    if isinstance(hidden, np.ndarray):
        return np.concatenate([np.ravel(part) for part in parts])
    return tf.concat([tf.reshape(part, [-1]) for part in parts], axis=0)


def run(arrays, noise, mask, segment_length=None):
    *arguments, gate_kernel = arrays
    result = F.moe_lstm(
        *arguments,
        route,
        weights=[gate_kernel],
        noise=None if noise is None else tf.constant(noise),
        mask=None if mask is None else tf.constant(mask),
        segment_length=segment_length,
    )
    return flat(*result[:3], *result.statistics[:2])


@pytest.mark.parametrize("segment_length", [None, 3])
def test_moe_lstm_equals_loops_in_value_and_every_gradient(case, segment_length):
    arrays, noise, mask = case
    assert_value_and_gradients(
        lambda *a: run(a, noise, mask, segment_length),
        lambda *a: flat(*oracle.moe_lstm(*a, STDDEV, noise, mask, K)),
        arrays,
    )


class Matrices:
    """Linear experts, as a dispatcher takes them."""

    def __init__(self, kernels):
        self.kernels = kernels

    def call(self, rows, counts):
        return F.feed_forward_experts(rows, [self.kernels], counts=counts)

    __call__ = call


def test_without_a_loop_value_and_every_gradient_are_the_same(case):
    arrays, noise, mask = case

    def unrolled(*arrays):
        inputs, h, c, kernels, bias, gate_kernel = arrays
        result = F.unrolled_moe_lstm(
            inputs,
            h,
            c,
            Matrices(kernels),
            bias,
            route,
            F.Dispatcher(),
            weights=[gate_kernel],
            noise=tf.constant(noise),
            mask=tf.constant(mask),
        )
        return flat(*result[:3], *result.statistics[:2])

    assert_value_and_gradients(
        unrolled,
        lambda *a: flat(*oracle.moe_lstm(*a, STDDEV, noise, mask, K)),
        arrays,
    )


def test_without_a_loop_the_number_of_steps_must_be_known():
    traced = tf.function(
        lambda x: F.unrolled_moe_lstm(
            x,
            tf.zeros([B, U]),
            tf.zeros([B, U]),
            Matrices(tf.zeros([E, D + U, 4 * U])),
            tf.zeros([4 * U]),
            route,
            F.Dispatcher(),
        ),
        input_signature=[tf.TensorSpec([None, B, D])],
    )
    with pytest.raises(ValueError, match=r"known number of time steps.*\(None, 2, 2\)"):
        traced.get_concrete_function()


@pytest.mark.parametrize(
    ("segment_length", "masked"),
    [
        (None, True),
        (2, False),
        (3, True),
        (9, False),
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for case in (
                (None, False),
                (1, False),
                (1, True),
                (2, True),
                (3, False),
                (4, False),
                (4, True),
                (9, True),
            )
        ),
    ],
)
def test_traced_segments_have_equal_values_and_gradients(case, segment_length, masked):
    arrays, noise, mask = case
    mask = mask if masked else None
    tensors = [tf.constant(array) for array in arrays]

    def all_of(segment_length, *tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            result = run(tensors, noise, mask, segment_length)
            total = tf.reduce_sum(tf.sin(result))
        return [result, *tape.gradient(total, tensors)]

    # An unknown length and batch, as a model with `Input((None, ...))` has.
    unknown = [tf.TensorSpec([None, None, D], tf.float64)]
    known = [tf.TensorSpec(tensor.shape, tf.float64) for tensor in tensors[1:]]
    traced = tf.function(
        lambda *a: all_of(segment_length, *a), input_signature=unknown + known
    )
    for got, wanted in zip(traced(*tensors), all_of(None, *tensors), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)


def test_segments_are_computed_again_in_the_backward_pass(case):
    arrays, noise, _ = case
    traced = {}
    for segment_length in (None, 2):
        calls = []

        def activation(v, calls=calls):
            calls.append(v)
            return tf.tanh(v)

        @tf.function
        def f(*tensors, segment_length=segment_length, activation=activation):
            *arguments, gate_kernel = tensors
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                result = F.moe_lstm(
                    *arguments,
                    route,
                    weights=[gate_kernel],
                    activation=activation,
                    segment_length=segment_length,
                )
                total = tf.reduce_sum(result.hidden)
            return tape.gradient(total, tensors)

        f.get_concrete_function(*(tf.constant(array) for array in arrays))
        traced[segment_length] = len(calls)
    assert traced == {None: 2, 2: 4}  # of the cell input and of the state


def test_lstm_step_equals_its_formula(rng):
    def step(z, c):
        i, f, g, o = np.split(z, 4, axis=1)
        c = oracle.sigmoid(f) * c + oracle.sigmoid(i) * np.tanh(g)
        return np.concatenate([oracle.sigmoid(o) * np.tanh(c), c], axis=1)

    assert_value_and_gradients(
        lambda z, c: tf.concat(F.lstm_step(z, c), axis=1),
        step,
        [rng.normal(size=(3, 8)), rng.normal(size=(3, 2))],
    )


def test_mixed_product_equals_the_sum_over_all_experts(rng):
    experts = np.array([[0, 2], [3, 1], [2, 0]])
    plan = F.make_dispatch_plan(tf.constant(experts), E)

    def product(x, kernels, gates):
        return np.stack(
            [
                sum(gates[n, j] * x[n] @ kernels[experts[n, j]] for j in range(2))
                for n in range(3)
            ]
        )

    assert_value_and_gradients(
        lambda x, kernels, gates: F.mixed_product(x, kernels, gates, plan),
        product,
        [rng.normal(size=(3, D)), rng.normal(size=(E, D, 5)), rng.random((3, 2))],
    )


def test_gates_that_cannot_be_used_in_a_recurrence(case):
    arrays, _, _ = case

    def varying(u, noise, mask, gate_kernel):
        tokens = tf.range(tf.shape(u)[0])
        return F.make_gating_result(
            tf.ones([B], tf.float64), tokens, E, token_indices=tokens
        )

    def with_losses(*args):
        return route(*args)._replace(auxiliary_losses=(tf.constant(1.0),))

    *arguments, gate_kernel = [tf.constant(array) for array in arrays]
    for gate, numbers in (varying, "rank 1 and 0"), (with_losses, "rank 2 and 1"):
        with pytest.raises(ValueError, match=numbers):
            F.moe_lstm(*arguments, gate, weights=[gate_kernel])


def test_segment_length_must_be_positive(case):
    with pytest.raises(ValueError, match="`segment_length`.*Received.*0"):
        run(case[0], None, None, segment_length=0)


def test_oracle_of_one_expert_is_a_plain_lstm(rng):
    # The oracle itself, by hand: all zero kernels, bias b, one step.
    bias = np.array([0.5, 0.5, 1.0, 1.0, -1.0, -1.0, 2.0, 2.0])
    zeros = np.zeros((1, 1, 2))
    _, h, c, importance, _ = oracle.moe_lstm(
        zeros,
        np.zeros((1, 2)),
        np.ones((1, 2)),
        np.zeros((2, 4, 8)),
        bias,
        np.zeros((4, 2)),
        1.0,
        np.zeros((1, 1, 2)),
        np.ones((1, 1), bool),
        1,
    )
    expected = oracle.sigmoid(1.0) + oracle.sigmoid(0.5) * np.tanh(-1.0)
    np.testing.assert_allclose(c, [[expected] * 2])
    np.testing.assert_allclose(h, [[oracle.sigmoid(2.0) * np.tanh(expected)] * 2])
    np.testing.assert_array_equal(importance, [1, 0])
    assert mixture.top_k(np.zeros(2), 1) == [0]
