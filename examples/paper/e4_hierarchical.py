"""E4: a hierarchical mixture is as good as a flat one (appendix B, table 7).

    python examples/paper/e4_hierarchical.py

64 experts, flat with k = 4, and in 8 groups of 8 with k = (2, 2).

Checks: their perplexities differ by less than 5 %, and both are below 0.7 times that of
a mixture of 4 experts. And two facts of appendix B, of a small mixture by itself: with
every group chosen the output is that of equation 12, summed over all experts; the load
of equation 14 has a gradient with respect to the primary gate, which the load within a
group alone has not.
"""

import experiment
import numpy as np
import tensorflow as tf
from arms import Arm

from keras_moe import functional, layers


def plan(seed, without):
    size = 9 if without == "experts" else 64
    return {
        "MoE-4": Arm(num_experts=4, seed=seed),
        "MoE-64": Arm(seed=seed),
        "MoE-64-h": Arm("hierarchical", size, seed=seed),
    }


def check(found):
    few, flat, tree = (
        found[title]["perplexity"] for title in ("MoE-4", "MoE-64", "MoE-64-h")
    )
    apart = distance_from_equation_12()
    of_load, of_naive = gradients_of_load()
    return {
        f"hierarchical / flat: {tree / flat:.3f} within 5 %": abs(tree / flat - 1)
        < 0.05,
        f"flat / MoE-4: {flat / few:.3f} < 0.7": flat / few < 0.7,
        f"hierarchical / MoE-4: {tree / few:.3f} < 0.7": tree / few < 0.7,
        f"distance from equation 12: {apart:.1e} < 1e-5": apart < 1e-5,
        f"largest gradient of the load of equation 14: {of_load:.3f} > 0": of_load > 0,
        f"the same of the load within groups: {of_naive:.3f} = 0": of_naive == 0,
    }


def distance_from_equation_12():
    """Largest difference of a layer with k1 = a from the sum over all experts."""
    rng = np.random.default_rng(0)
    layer = layers.HierarchicalMoE(
        layers.FeedForwardExperts(12, hidden_units=8),
        num_groups=4,
        k=(4, 3),
        primary_gating=layers.SoftmaxGating(gate_initializer="glorot_uniform"),
    )
    x = rng.normal(size=(20, 6)).astype("float32")
    layer(x)
    gating = layer.gating
    gating.gate_kernel.assign(rng.normal(size=gating.gate_kernel.shape))
    primary = _softmax(x @ gating.primary_gating.gate_kernel.numpy())
    expected = 0.0
    first, second = (kernel.numpy() for kernel in layer.experts.kernels)
    for i in range(4):
        secondary = _softmax(x @ gating.gate_kernel.numpy()[i])
        for j in range(3):
            e = 3 * i + j
            output = np.maximum(x @ first[e], 0) @ second[e]
            expected = expected + (primary[:, i] * secondary[:, j])[:, None] * output
    return float(np.max(np.abs(layer(x).numpy() - expected)))


def gradients_of_load():
    """Largest gradient with respect to the primary gate: equation 14, and without."""
    rng = np.random.default_rng(0)
    tokens, groups, size, features = 50, 4, 3, 6
    x = tf.constant(rng.normal(size=(tokens, features)))
    kernel = tf.constant(0.3 * rng.normal(size=(features, groups)))
    weights = tf.constant(rng.normal(size=(groups, size)))
    noise = tf.constant(rng.normal(size=(tokens, groups)))
    secondary = rng.uniform(size=(tokens, groups, size))  # P(x, j) in each group
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(kernel)
        clean = x @ kernel
        stddev = tf.ones_like(clean)
        noisy = functional.noisy_logits(clean, stddev, noise)
        probs = functional.prob_in_top_k(clean, noisy, stddev, 2)
        _, chosen = functional.top_k_gating(noisy, 2)
        sent = tf.reduce_sum(tf.one_hot(chosen, groups, dtype=tf.float64), axis=1)
        within = tf.einsum("ng,ngs->gs", sent, tf.constant(secondary))
        counts = tf.cast(tf.reduce_sum(sent, axis=0), tf.int32)
        load = functional.hierarchical_load(functional.load(probs), within, counts)
        # Each a number with a gradient for every expert of its own.
        of_load = tf.reduce_sum(weights * tf.reshape(load, weights.shape))
        of_naive = tf.reduce_sum(weights * within)
    found = []
    for number in (of_load, of_naive):
        gradient = tape.gradient(number, kernel)
        found.append(0.0 if gradient is None else float(np.max(np.abs(gradient))))
    return found


def _softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


if __name__ == "__main__":
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        columns={
            "perplexity": ".3f",
            "gate_operations": ",",
            "importance_cv": ".3f",
            "load_cv": ".3f",
            "max_over_mean": ".2f",
        },
        causes={"experts": "the hierarchical mixture has 9 experts in 3 groups"},
    )
