import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F

E, D, H = 4, 6, 8


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_recomputed_experts_have_the_same_values_and_gradients(rng, static, traced):
    kernels = [
        tf.constant(rng.normal(size=(E, a, b))) for a, b in ((D, H), (H, H), (H, D))
    ]
    biases = [tf.constant(rng.normal(size=(E, b))) for b in (H, H, D)]
    counts = tf.constant([3, 0, 5, 2])
    x = tf.constant(rng.normal(size=(E, 3, D) if static else (10, D)))
    results = []
    for recompute in (False, True):

        def run(x, *weights, recompute=recompute):
            with tf.GradientTape() as tape:
                tape.watch([x, *weights])
                outputs = F.feed_forward_experts(
                    x, weights[:3], weights[3:], counts, tf.nn.gelu, recompute
                )
                total = tf.reduce_sum(tf.sin(outputs))
            return [outputs, *tape.gradient(total, [x, *weights])]

        run = tf.function(run) if traced else run
        results.append(run(x, *kernels, *biases))
    for kept, recomputed in zip(*results, strict=True):
        np.testing.assert_allclose(recomputed, kept, rtol=1e-12, atol=1e-12)


def test_hidden_products_are_computed_again_in_the_backward_pass():
    kernels = [tf.ones((E, D, H)), tf.ones((E, H, D))]
    products = {}
    for recompute in (False, True):

        @tf.function
        def run(x, recompute=recompute):
            with tf.GradientTape() as tape:
                tape.watch(kernels)
                y = F.feed_forward_experts(
                    x, kernels, None, [1, 1, 1, 1], tf.tanh, recompute
                )
            return tape.gradient(y, kernels)

        graph = run.get_concrete_function(tf.TensorSpec((4, D))).graph
        products[recompute] = sum(op.type == "Tanh" for op in graph.get_operations())
    assert products == {False: E, True: 2 * E}
