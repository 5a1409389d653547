"""Importance, load, the losses that balance them (section 4, appendix A), and later ones.

The paper's losses take statistics, not gates: the squared coefficient of variation
is not linear, so importance and load have to be summed over the whole global
batch, over every replica, before they are squared. The later ones sum over the
replicas themselves.
"""

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import ops

_EPSILON = 1e-10
# Logits are clipped to this range in a loss that squares them.
_LOGIT_LIMIT = 1e15


def importance(
    gates: tf.Tensor, expert_indices: tf.Tensor, num_experts: int
) -> tf.Tensor:
    """Sum of the gates of each expert over a batch.

    $\\mathrm{Importance}(X) = \\sum_{x \\in X} G(x)$

    Args:
        gates: Float, any shape. Weight of each assignment of a token to an
            expert; all others are zero.
        expert_indices: int32, shape of `gates`. The expert of each assignment;
            `-1` (padding) is left out.
        num_experts: E.

    Returns:
        `(E,)`, dtype of `gates`. Zero for experts without a token.

    Reference:
        Shazeer et al. 2017, equation 6.
    """
    return ops.sum_by_expert(gates, expert_indices, num_experts)


def load(prob_in_top_k: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
    """Smooth estimate of the number of tokens of each expert.

    $\\mathrm{Load}(X)_i = \\sum_{x \\in X} P(x, i)$

    Args:
        prob_in_top_k: `(N, E)` float, from `functional.prob_in_top_k`.
        mask: `(N,)` bool or None. False marks padding, which is left out.

    Returns:
        `(E,)`, dtype of `prob_in_top_k`.

    Reference:
        Shazeer et al. 2017, equation 10.
    """
    if mask is not None:
        prob_in_top_k = tf.where(
            mask[:, tf.newaxis], prob_in_top_k, tf.zeros_like(prob_in_top_k)
        )
    return ops.sum_of_rows(prob_in_top_k)


def expert_counts(expert_indices: tf.Tensor, num_experts: int) -> tf.Tensor:
    """True number of assignments of each expert.

    Args:
        expert_indices: int32, any shape; `-1` (padding) is left out.
        num_experts: E.

    Returns:
        `(E,)` int32. No gradient.
    """
    return ops.count_by_expert(expert_indices, num_experts)


def cv_squared(values: tf.Tensor, epsilon: float = _EPSILON) -> tf.Tensor:
    """Squared coefficient of variation: population variance over squared mean.

    The variance is formed directly, not as the square of a standard deviation,
    so the gradient at perfect balance is 0 and not NaN.

    Args:
        values: `(E,)` or any shape; all elements count as one vector.
        epsilon: Added to the squared mean, at least 0. All-zero values give 0.

    Returns:
        `()`, dtype of `values` (float32 at least).

    Raises:
        ValueError: `epsilon` is negative or not finite.

    Reference:
        Shazeer et al. 2017, equations 7 and 11.
    """
    epsilon = checks.verify_weight(epsilon, "epsilon")
    values = ops.cast_up(values)
    mean = tf.reduce_mean(values)
    variance = tf.reduce_mean(tf.square(values - mean))
    # A square, or an epsilon, may underflow.
    divide = tf.divide if epsilon >= _EPSILON else tf.math.divide_no_nan
    return divide(variance, tf.square(mean) + epsilon)


def importance_loss(importance: tf.Tensor, weight: float = 1.0) -> tf.Tensor:
    """Penalty on unequal importance of the experts.

    $L_{importance}(X) = w_{importance} \\cdot CV(\\mathrm{Importance}(X))^2$

    Args:
        importance: `(E,)` float, summed over the global batch.
        weight: $w_{importance}$, at least 0.

    Returns:
        `()` float32 or float64.

    Raises:
        ValueError: `weight` is negative or not finite.

    Reference:
        Shazeer et al. 2017, equation 7.
    """
    return weight * cv_squared(importance)


def load_loss(load: tf.Tensor, weight: float = 1.0) -> tf.Tensor:
    """Penalty on unequal numbers of tokens of the experts.

    $L_{load}(X) = w_{load} \\cdot CV(\\mathrm{Load}(X))^2$

    Args:
        load: `(E,)` float, summed over the global batch.
        weight: $w_{load}$, at least 0.

    Returns:
        `()` float32 or float64.

    Raises:
        ValueError: `weight` is negative or not finite.

    Reference:
        Shazeer et al. 2017, equation 11.
    """
    return weight * cv_squared(load)


def router_z_loss(
    logits: tf.Tensor, mask: tf.Tensor | None = None, weight: float = 1.0
) -> tf.Tensor:
    """Penalty on large logits of a gate, whose softmax rounding errors would move.

    $L_z = w_z \\cdot \\frac{1}{N} \\sum_{x} \\left(\\log \\sum_i e^{(x W_g)_i}\\right)^2$

    Args:
        logits: `(N, E)` float, without noise. On several replicas the tokens of this
            one: the mean is that of the global batch.
        mask: `(N,)` bool or None. False marks padding, which is left out.
        weight: $w_z$, at least 0.

    Returns:
        `()` float32 or float64; 0 without a token.

    Raises:
        ValueError: `weight` is negative or not finite.

    Reference:
        Zoph et al. 2022, "ST-MoE", equation 5.
    """
    logits = tf.clip_by_value(ops.cast_up(logits), -_LOGIT_LIMIT, _LOGIT_LIMIT)
    squares = tf.square(tf.reduce_logsumexp(_of_real(logits, mask), axis=-1))
    total = tf.reduce_sum(_of_real(squares, mask))
    sums = tf.stack([total, _num_real(logits, mask)])
    total, num_tokens = tf.unstack(ops.sum_over_replicas(sums))
    return weight * tf.math.divide_no_nan(total, num_tokens)


def switch_loss(
    probabilities: tf.Tensor,
    counts: tf.Tensor,
    mask: tf.Tensor | None = None,
    weight: float = 1.0,
) -> tf.Tensor:
    """The auxiliary loss of Switch and GShard: shares of tokens times probabilities.

    $L = w \\cdot E \\cdot \\sum_i f_i P_i$

    $f_i$ is the share of the assignments that expert i gets, a constant to the
    gradient; $P_i$ the mean of its probability over the tokens. It is w at perfect
    balance, and at most w E.

    Args:
        probabilities: `(N, E)` float, the softmax over all logits. On several
            replicas the tokens of this one: shares and means are those of the
            global batch.
        counts: `(E,)` int32, assignments of each expert (`expert_counts`), on several
            replicas of the tokens of this one.
        mask: `(N,)` bool or None. False marks padding, which is left out, and which
            `counts` must have left out.
        weight: $w$, at least 0.

    Returns:
        `()` float32 or float64; 0 without a token.

    Raises:
        ValueError: `weight` is negative or not finite.

    Reference:
        Fedus et al. 2021, "Switch Transformers", equations 4 to 6. There a token has
        one expert; with more of them the shares still sum to 1.
    """
    probabilities = _of_real(ops.cast_up(probabilities), mask)
    counts = tf.cast(tf.stop_gradient(counts), probabilities.dtype)
    num_experts = probabilities.shape[-1]
    sums = [ops.sum_of_rows(probabilities), counts, [_num_real(probabilities, mask)]]
    sums = ops.sum_over_replicas(tf.concat(sums, axis=0))
    sums, counts, num_tokens = tf.split(sums, [num_experts, num_experts, 1])
    shares = tf.math.divide_no_nan(counts, tf.reduce_sum(counts))
    means = tf.math.divide_no_nan(sums, num_tokens)
    return weight * num_experts * tf.reduce_sum(shares * means)


def _of_real(values, mask):
    """The values in which those of padding are 0, and so is their gradient."""
    if mask is None:
        return values
    for _ in range(values.shape.rank - 1):
        mask = mask[:, tf.newaxis]
    return tf.where(mask, values, tf.zeros_like(values))


def _num_real(values, mask):
    """How many of the rows are no padding, in the type of the values."""
    if mask is None:
        return tf.cast(tf.shape(values)[0], values.dtype)
    # In floats, which a GPU adds; exact for 16 million tokens.
    return tf.reduce_sum(tf.cast(mask, values.dtype))


def max_over_mean(values: tf.Tensor) -> tf.Tensor:
    """Largest value over the mean: 1 at perfect balance, at most n / k.

    Args:
        values: `(E,)`, for example the counts or the load of the experts.

    Returns:
        `()` float32, 0 if all values are zero.

    Reference:
        Shazeer et al. 2017, table 6.
    """
    values = tf.cast(values, tf.float32)
    return tf.math.divide_no_nan(tf.reduce_max(values), tf.reduce_mean(values))


def gate_entropy(
    gates: tf.Tensor, num_tokens: tf.Tensor | int, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """How undecided a gate is: the entropy of each token's gates, summed.

    $\\sum_{x \\in X} -\\sum_i G(x)_i \\log G(x)_i$

    0 where one expert has the whole weight, `log(k)` where k share it equally.

    Args:
        gates: Float, `(N, K)`, or `(M,)` where tokens have different numbers of
            experts. A gate of 0 counts nothing.
        num_tokens: N.
        mask: `(N,)` bool or None. False marks padding, which is left out. For
            `gates` of shape `(M,)`, whose padding has no assignments, it is only
            counted.

    Returns:
        entropy: `()`, dtype of `gates`, in nats.
        tokens: `()` int32, how many tokens that is the sum of.

    Reference:
        Shannon 1948, "A mathematical theory of communication".
    """
    terms = -tf.math.xlogy(gates, gates)
    if mask is None:
        return tf.reduce_sum(terms), tf.cast(num_tokens, tf.int32)
    if gates.shape.rank == 2:
        terms = tf.where(mask[:, tf.newaxis], terms, tf.zeros_like(terms))
    num_real = tf.reduce_sum(tf.cast(mask, tf.int64))
    return tf.reduce_sum(terms), tf.cast(num_real, tf.int32)


def choices_kept(
    clean_logits: tf.Tensor, expert_indices: tf.Tensor, mask: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """What a gate's noise leaves of its choices: a share for each token, summed.

    $\\sum_{x \\in X} |\\mathrm{TopK}(x W_g) \\cap \\mathrm{TopK}(H(x))| / k$

    A share is 1 where the noise changes nothing. A choice by lot among E experts
    leaves k / E on average.

    Args:
        clean_logits: `(N, E)` float, $x W_g$.
        expert_indices: `(N, K)` int32 within [0, E), the experts chosen with noise,
            none twice for a token.
        mask: `(N,)` bool or None. False marks padding, which is left out.

    Returns:
        kept: `()` float32 or float64, the sum of the shares. No gradient.
        tokens: `()` of that type, how many tokens that is the sum of.
    """
    logits = tf.stop_gradient(ops.cast_up(clean_logits))
    k = expert_indices.shape[-1]
    values, indices = ops.top_k(logits, k)
    least, last = values[:, k - 1 :], indices[:, k - 1 :]
    chosen, experts = ops.pick(logits, expert_indices), expert_indices
    # Among equal logits the lower index is in, as in `top_k_gating`.
    is_kept = (chosen > least) | (
        (chosen == least) & (tf.cast(experts, last.dtype) <= last)
    )
    shares = _of_real(tf.reduce_mean(tf.cast(is_kept, logits.dtype), axis=-1), mask)
    return tf.reduce_sum(shares), _num_real(logits, mask)
