"""Experts choose tokens: every expert takes those that like it best."""

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import ops
from keras_moe.functional.capacity import rounded_up
from keras_moe.functional.gating import softmax_gating
from keras_moe.functional.strict_balance import batchwise_mask


def expert_choice_capacity(
    num_tokens: tf.Tensor | int, num_experts: int, capacity_factor: float
) -> tf.Tensor:
    """Tokens that each expert takes: $C = \\lceil c N / E \\rceil$, at most N.

    Args:
        num_tokens: N, an int or a scalar integer tensor.
        num_experts: E.
        capacity_factor: c, experts for each token on average, above 0.

    Returns:
        `()` int32 within [0, N].

    Raises:
        ValueError: `num_experts` or `capacity_factor` is out of range.

    Reference:
        Zhou et al. 2022, section 3.2, where $k = n c / e$ is not rounded.
    """
    num_experts = checks.verify_positive_int(num_experts, "num_experts")
    capacity_factor = checks.verify_number(
        capacity_factor, "capacity_factor", "(0, inf)"
    )
    # In floats, which a GPU compares.
    capacity = rounded_up(num_tokens, capacity_factor / num_experts)
    return tf.cast(tf.minimum(capacity, tf.cast(num_tokens, capacity.dtype)), tf.int32)


def expert_choice_gating(
    logits: tf.Tensor, capacity: tf.Tensor | int, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Every expert takes the `capacity` tokens of largest gate; gates are not changed.

    $S = \\mathrm{Softmax}(X W_g)$, and of each column of S the C largest are kept.

    A token has as many experts as choose it, none up to all. Among equals the token of
    lower index wins. A token of NaN loses against every other, and goes to the first
    expert besides, so that it is seen.

    Args:
        logits: `(N, E)` float. On several replicas the tokens of this one: the choice
            is among those of the global batch.
        capacity: C, tokens of each expert in the global batch, an int or a scalar int32
            tensor; more than there are selects all.
        mask: `(N,)` bool or None. Tokens marked False (padding) are never chosen.

    Returns:
        gates: `(N, E)` float32 (float64 for float64 logits), 0 where not chosen.
        selected: `(N, E)` bool. No gradient.

    Reference:
        Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2.
    """
    scores = softmax_gating(logits)
    broken = tf.math.is_nan(scores)
    last = -tf.ones_like(scores)
    ranked = tf.where(broken, last, scores)
    if mask is not None:
        ranked = tf.where(mask[:, tf.newaxis], ranked, last)
    selected = ops.over_columns(
        ranked, lambda columns: batchwise_mask(columns, capacity), -1.0
    )
    selected |= broken & (tf.range(scores.shape[-1]) == 0)
    if mask is not None:
        selected &= mask[:, tf.newaxis]
    return tf.where(selected, scores, tf.zeros_like(scores)), selected
