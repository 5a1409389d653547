"""Every plan under every policy, eagerly and in a graph, in training and not.

In a graph `tf.where(condition, 0.0, x)` fails for x of half precision and works
eagerly: each plan is traced.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers
from keras_moe.layers.projected_lstm import ProjectedLSTMCell

D = 4
POLICIES = [
    "mixed_bfloat16",
    pytest.param("mixed_float16", marks=pytest.mark.slow),
    *(
        pytest.param(policy, marks=[pytest.mark.slow, pytest.mark.exhaustive])
        for policy in ("float32", "bfloat16", "float16")
    ),
]


def mixture(num_experts, gate=None, **options):
    gate = gate or layers.NoisyTopKGating(k=2, gate_initializer="glorot_uniform")
    experts = layers.FeedForwardExperts(num_experts, 3, use_bias=True)
    return layers.MoE(experts, gate, **options)


PLANS = {
    "one by one": lambda: mixture(4),
    "blocks": lambda: mixture(257),
    "capacity": lambda: mixture(4, capacity_factor=1.0),
    "capacity of many": lambda: mixture(257, capacity_factor=1.0),
    "differing numbers": lambda: mixture(4, layers.BalancedGating(k=2)),
    "differing numbers of many": lambda: mixture(257, layers.BalancedGating(k=2)),
    "all": lambda: mixture(4, layers.SoftmaxGating()),
    "groups of many": lambda: layers.HierarchicalMoE(
        layers.FeedForwardExperts(260, 3), 20
    ),
    "list": lambda: layers.MoE(
        layers.ExpertList([keras.layers.Dense(D) for _ in range(3)]),
        layers.NoisyTopKGating(k=2),
    ),
    "recomputed": lambda: layers.MoE(
        layers.FeedForwardExperts(257, 3, recompute=True), layers.NoisyTopKGating(k=2)
    ),
    "recurrent": lambda: layers.MoELSTM(3, 257, return_sequences=True),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_trains_and_evaluates_in_every_precision(plan, policy):
    keras.config.set_dtype_policy(policy)
    layer = PLANS[plan]()
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 6, D)), layer.compute_dtype)
    mask = np.arange(6) < np.array([[6], [4]])
    layer(x, training=False)

    def step(training):
        with tf.GradientTape() as tape:
            outputs = layer(x, mask=mask, training=training)
            total = tf.reduce_sum(tf.cast(outputs, tf.float32) ** 2)
            total += sum(tf.cast(loss, tf.float32) for loss in layer.losses)
        weights = [v.value for v in layer.trainable_variables]
        found = tape.gradient(total, weights, unconnected_gradients="zero")
        return outputs, [tf.convert_to_tensor(gradient) for gradient in found]

    graph = tf.function(step)
    for outputs, gradients in (graph(True), graph(False)):
        assert outputs.dtype == layer.compute_dtype
        for tensor in (outputs, *gradients):
            assert np.isfinite(tensor.numpy().astype("float64")).all()
    # Without noise the graph is what runs eagerly.
    np.testing.assert_allclose(
        graph(False)[0].numpy().astype("float64"),
        layer(x, mask=mask).numpy().astype("float64"),
        atol=0.1 if "16" in policy else 1e-5,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_recurrent_kernel_of_half_precision_starts_orthogonal(dtype):
    # TensorFlow's QR has no bfloat16: drawn in float32.
    cells = [
        layers.MoELSTMCell(4, 2, dtype=dtype),
        ProjectedLSTMCell(4, 4, dtype=dtype),
    ]
    for cell in cells:
        cell.build((None, 3))
    for kernel in (*cells[0].kernel[:, 3:], cells[1].recurrent_kernel.value):
        rows = tf.cast(kernel, tf.float32).numpy()
        np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=0.03)
