"""Gated linear units as experts."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional, layers
from tests.helpers import assert_value_and_gradients, dense_gates
from tests.oracles import experts as oracle

N, D, E, K, H, OUT = 9, 5, 4, 2, 3, 2


def routing(rng):
    return np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype("int32")


@pytest.mark.parametrize("plan", ["sorted", "slots"])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"computation": "blocks"}, {"recompute": True}], ids=str
)
def test_a_mixture_equals_the_oracle_in_value_and_every_gradient(
    rng, plan, use_bias, options
):
    indices = routing(rng)
    make = {
        "sorted": lambda: functional.make_dispatch_plan(indices, E),
        "slots": lambda: functional.make_slot_plan(indices, E, capacity=3, spill=2),
    }[plan]
    weights = [rng.normal(size=(E, *s)) for s in ((D, H), (D, H), (H, OUT))]
    if use_bias:
        weights += [rng.normal(size=(E, s)) for s in (H, H, OUT)]

    def expected(x, gates, *weights):
        def expert(e, token):
            own = [weight[e] for weight in weights]
            return oracle.gated(token, own[:3], *([own[3:]] if use_bias else []))

        return oracle.mixture(x, dense_gates(gates, indices, E), expert)

    network = functional.gated_network(keras.activations.silu)
    assert_value_and_gradients(
        lambda x, gates, *weights: functional.mix_experts(
            network, x, gates, make(), weights, **options
        ),
        expected,
        [rng.normal(size=(N, D)), rng.uniform(0.1, 1.0, (N, K)), *weights],
    )


@pytest.mark.parametrize(
    ("activation", "function"),
    [("silu", oracle.silu), ("linear", lambda v: v), ("relu", lambda v: v * (v > 0))],
)
def test_the_layer_takes_any_activation_and_names_its_weights(
    rng, activation, function
):
    layer = layers.GatedExperts(
        E, H, output_units=OUT, activation=activation, use_bias=True, dtype="float64"
    )
    x = rng.normal(size=(E, N, D))
    layer(x)
    names = ["activated_kernel", "activated_bias", "linear_kernel", "linear_bias"]
    assert [w.name for w in layer.weights] == [*names, "output_kernel", "output_bias"]
    arrays = [rng.normal(size=w.shape) for w in layer.weights]
    layer.set_weights(arrays)
    expected = [
        [
            oracle.gated(
                token,
                [w[e] for w in arrays[::2]],
                [w[e] for w in arrays[1::2]],
                function,
            )
            for token in x[e]
        ]
        for e in range(E)
    ]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-10)


def test_an_expert_of_ones_by_hand():
    # One expert, all ones: silu(2) * 2 * 3 with 2 features and 3 hidden units.
    layer = layers.GatedExperts(1, 3, kernel_initializer="ones")
    answer = layer(np.ones((1, 1, 2), "float32"))
    wanted = float(oracle.silu(2.0)) * 2.0 * 3.0
    np.testing.assert_allclose(answer, np.full((1, 1, 2), wanted), rtol=1e-6)


def test_frozen_gated_experts_have_no_gradient(rng):
    layer = layers.GatedExperts(3, H, frozen_experts=(1,))
    x = rng.normal(size=(3, 4, D)).astype("float32")
    layer(x)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(x) ** 2)
    for gradient in tape.gradient(total, [w.value for w in layer.trainable_weights]):
        moved = np.abs(gradient).reshape(3, -1).max(axis=1) > 0
        np.testing.assert_array_equal(moved, [True, False, True])


def test_bad_gated_experts_are_refused():
    with pytest.raises(ValueError, match="hidden_units=0"):
        layers.GatedExperts(2, 0)
    with pytest.raises(ValueError, match=r"hidden_units=\[4, 4\]"):
        layers.GatedExperts(2, [4, 4])
