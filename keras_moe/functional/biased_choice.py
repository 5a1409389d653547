"""Gates whose choice is shifted by a bias for each expert, and kept within groups.

The choice of DeepSeek-V3: the bias balances the load without a loss. It is moved by
hand, and the gates do not contain it, so nothing but the task gives a gradient.
"""

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import ops
from keras_moe.functional.gating import as_gate_logits

SCORES = ("sigmoid", "softmax")
SCORE_NORMALIZATIONS = ("selected", "none")


def biased_gating(
    logits: tf.Tensor,
    bias: tf.Tensor,
    k: int,
    scores: str = "sigmoid",
    normalization: str = "selected",
    num_groups: int = 1,
    num_kept_groups: int = 1,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Picks the k experts of largest score plus bias; gates are the scores alone.

    $g_i = s_i / \\sum_{j \\in K} s_j$ for $i \\in K = \\mathrm{TopK}(s + b, k)$, with
    $s = \\sigma(x W_g)$ or $\\mathrm{Softmax}(x W_g)$

    With groups, experts `i * E / G` to `(i + 1) * E / G - 1` being group i, only those
    of the `num_kept_groups` best groups can be chosen. The score of a group is the sum
    of its two largest $s + b$ for sigmoid scores, the largest for softmax scores.

    Among equals the lower index wins.

    Args:
        logits: `(N, E)` float.
        bias: `(E,)` float. No gradient.
        k: Experts for each token, at most those of the kept groups.
        scores: `"sigmoid"`, each expert by itself, or `"softmax"`, over all experts.
        normalization: `"selected"` divides by the sum over the chosen experts, so that
            gates sum to 1; `"none"` leaves the scores as they are.
        num_groups: G, which divides E.
        num_kept_groups: Groups within which a token stays.

    Returns:
        gates: `(N, K)` float32 or float64, in descending order of score plus bias.
        expert_indices: `(N, K)` int32, no expert twice in a row.

    Raises:
        ValueError: An argument is not as above.

    Reference:
        DeepSeek-AI 2024, "DeepSeek-V3", equations 12 to 16 (groups: section 2.1.2, and
        "DeepSeek-V2", section 2.1.3, for softmax); Wang et al. 2024, "Auxiliary-Loss-Free
        Load Balancing", equation 3. There the scores of other groups are set to 0,
        which an expert with a negative bias would lose to; here they are out.
    """
    checks.verify_choice(scores, "scores", SCORES)
    checks.verify_choice(normalization, "normalization", SCORE_NORMALIZATIONS)
    logits = as_gate_logits(logits)
    verify_kept_groups(k, logits.shape[-1], num_groups, num_kept_groups)
    # Logarithms of the scores: quotients of scores are a softmax of them, which cannot
    # become 0 / 0.
    logs = logits if scores == "softmax" else tf.math.log_sigmoid(logits)
    all_scores = tf.nn.softmax(logits) if scores == "softmax" else tf.sigmoid(logits)
    biased = tf.stop_gradient(all_scores + tf.cast(bias, logits.dtype))
    if num_kept_groups < num_groups:
        best = 2 if scores == "sigmoid" else 1
        biased = _within_groups(biased, num_groups, num_kept_groups, best)
    _, experts = ops.top_k(biased, k)
    if normalization == "selected":
        gates = tf.nn.softmax(ops.pick(logs, experts), axis=-1)
    else:
        gates = ops.pick(all_scores, experts)
    return gates, tf.cast(experts, tf.int32)


def _within_groups(values, num_groups, num_kept, best):
    """`(N, E)` values, the lowest there is outside of each token's best groups."""
    size = values.shape[-1] // num_groups
    grouped = tf.reshape(values, [-1, num_groups, size])
    largest, _ = ops.top_k(grouped, min(best, size))
    _, kept = ops.top_k(tf.reduce_sum(largest, axis=-1), num_kept)
    # (N, K) -> (N, G)
    is_kept = tf.reduce_sum(tf.one_hot(kept, num_groups, dtype=values.dtype), axis=1)
    grouped = tf.where(
        is_kept[..., tf.newaxis] > 0,
        grouped,
        tf.constant(values.dtype.min, values.dtype),
    )
    return tf.reshape(grouped, [-1, num_groups * size])


def balanced_bias(
    bias: tf.Tensor, counts: tf.Tensor, update_rate: float = 1e-3
) -> tf.Tensor:
    """The bias after a step: raised for experts below the mean load, else lowered.

    $b_i + u \\cdot \\mathrm{sign}(\\bar c - c_i)$

    Args:
        bias: `(E,)` float.
        counts: `(E,)` numbers, the tokens of each expert in the step, over all devices.
        update_rate: $u$, at least 0.

    Returns:
        `(E,)` of the type of `bias`. No gradient.

    Raises:
        ValueError: `update_rate` is negative or not finite.

    Reference:
        Wang et al. 2024, algorithm 1.
    """
    update_rate = checks.verify_weight(update_rate, "update_rate")
    counts = tf.cast(counts, tf.float64)
    error = tf.sign(tf.reduce_mean(counts) - counts)
    return tf.stop_gradient(bias + update_rate * tf.cast(error, bias.dtype))


def verify_kept_groups(
    k: int, num_experts: int, num_groups: int, num_kept_groups: int
) -> None:
    """Raises unless k experts can be chosen from the kept groups."""
    checks.verify_k(k, num_experts)
    checks.verify_positive_int(num_groups, "num_groups")
    checks.verify_positive_int(num_kept_groups, "num_kept_groups")
    if num_experts % num_groups:
        raise ValueError(
            "`num_groups` must divide `num_experts`. Received: "
            f"num_groups={num_groups}, num_experts={num_experts}. Every group has the "
            "same number of experts."
        )
    if num_kept_groups > num_groups or k * num_groups > num_kept_groups * num_experts:
        raise ValueError(
            "`num_kept_groups` must be at most `num_groups`, and hold `k` experts. "
            f"Received: num_kept_groups={num_kept_groups}, num_groups={num_groups}, "
            f"{num_experts // num_groups} experts a group, k={k}. Keep more groups, or "
            "lower `k`."
        )
