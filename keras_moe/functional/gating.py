"""Softmax and noisy top-k gates (routers; section 2.1 and appendix A).

Pure functions. Random noise is an argument, never drawn here. Gate maths runs
in float32 at least: half-precision logits are cast up.
"""

from typing import Any

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import losses, ops
from keras_moe.types import CountedStatistics, GateStatistics, GatingResult

# Logits are clipped to this range, so that infinite logits (an expert that a
# caller has masked out, or an overflow of half precision) give gates of 0 or 1
# and never NaN. It is far outside what a finite computation produces.
_LOGIT_LIMIT = 1e30
NORMALIZATIONS = ("selected", "all")

# What a noisy logit of 1 resolves.
_LEAST_STDDEV = {tf.float32: 2.0**-23, tf.float64: 2.0**-52}


def as_gate_logits(logits: tf.Tensor) -> tf.Tensor:
    """Casts to float32 (float64 is kept) and clips infinities.

    Args:
        logits: Float tensor of any shape.

    Returns:
        Tensor of the same shape, float32 or float64, within +-1e30. NaN stays
        NaN.
    """
    return _clip(ops.cast_up(logits), _LOGIT_LIMIT)


def _clip(x, limit):
    """`x` within +-limit, with the gradient of an identity.

    Where values are clipped, everything that is made of them is saturated and its
    gradient zero anyway; the gradient of `tf.clip_by_value` would compare and
    select once more.
    """

    @tf.custom_gradient
    def run(x):
        return tf.clip_by_value(x, -limit, limit), lambda dy: dy

    return run(x)


def softmax_gating(logits: tf.Tensor) -> tf.Tensor:
    """Gates of a mixture in which every expert takes part.

    $G_\\sigma(x) = \\mathrm{Softmax}(x W_g)$

    Args:
        logits: `(N, E)` float, $x W_g$.

    Returns:
        `(N, E)` float32 (float64 for float64 logits); rows sum to 1.

    Reference:
        Shazeer et al. 2017, equation 2.
    """
    return tf.nn.softmax(as_gate_logits(logits), axis=-1)


def noise_stddev(raw_noise: tf.Tensor, noise_epsilon: float = 1e-2) -> tf.Tensor:
    """Standard deviation of the noise on each logit.

    $\\mathrm{Softplus}(x W_{noise}) + \\epsilon$

    Args:
        raw_noise: `(N, E)` float, $x W_{noise}$.
        noise_epsilon: Least standard deviation, at least 0. The paper's equation
            4 has none; the authors' code adds 1e-2 for numerical stability.

    Returns:
        `(N, E)` float32 or float64, at least 0.

    Raises:
        ValueError: `noise_epsilon` is negative.

    Reference:
        Shazeer et al. 2017, equation 4.
    """
    return tf.nn.softplus(as_gate_logits(raw_noise)) + noise_epsilon


def noisy_logits(
    clean_logits: tf.Tensor, stddev: tf.Tensor, noise: tf.Tensor
) -> tf.Tensor:
    """Adds scaled noise to the logits.

    $H(x)_i = (x W_g)_i + \\mathrm{noise}_i \\cdot \\mathrm{stddev}_i$

    Args:
        clean_logits: `(N, E)` float, $x W_g$.
        stddev: `(N, E)` float, from `noise_stddev`.
        noise: `(N, E)` float, standard normal, independent for every token and
            expert.

    Returns:
        `(N, E)` float32 or float64.

    Reference:
        Shazeer et al. 2017, equation 4.
    """
    clean_logits = as_gate_logits(clean_logits)
    return clean_logits + stddev * tf.cast(noise, clean_logits.dtype)


def largest_logits(logits: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The k largest logits and the next one, for the two functions that need them.

    `top_k_gating` and `prob_in_top_k` both sort the noisy logits; handed to both
    as `largest`, this sorts once. It pays where there are many tokens.

    Args:
        logits: `(N, E)` float.
        k: Experts for each token, `1 <= k < E`.

    Returns:
        values: `(N, K + 1)` float32 or float64, in descending order.
        indices: `(N, K + 1)` int32; among equal logits the lower index is first.

    Raises:
        ValueError: `k` is not as above.
    """
    logits = as_gate_logits(logits)
    _verify_k_below(k, logits.shape[-1])
    values, indices = ops.top_k(logits, k + 1)
    return values, tf.cast(indices, tf.int32)


def top_k_gating(
    logits: tf.Tensor,
    k: int,
    normalization: str = "selected",
    largest: tuple[tf.Tensor, tf.Tensor] | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Keeps the k largest logits of each token.

    $G(x) = \\mathrm{Softmax}(\\mathrm{KeepTopK}(H(x), k))$

    Among equal logits the expert of lower index wins.

    Args:
        logits: `(N, E)` float, noisy in training and clean at inference.
        k: Experts for each token, `1 <= k <= E`.
        normalization: `"selected"` takes the softmax over the k kept logits
            (the paper). `"all"` takes it over all E logits and keeps k of the
            probabilities, so gates sum to less than 1. With `k=1`,
            `"selected"` gives gates that are constantly 1 and no gradient from
            the task to the gate; `"all"` does give one.
        largest: What `largest_logits` returned for these logits, if at hand.

    Returns:
        gates: `(N, K)` float32 or float64, in descending order.
        expert_indices: `(N, K)` int32, no expert twice in a row.

    Raises:
        ValueError: `k` or `normalization` is not as above.

    Reference:
        Shazeer et al. 2017, equations 3 and 5.
    """
    logits = as_gate_logits(logits)
    k = checks.verify_k(k, logits.shape[-1])
    if largest is None:
        kept, expert_indices = ops.top_k(logits, k)
    else:
        kept, expert_indices = (each[..., :k] for each in largest)
    checks.verify_choice(normalization, "normalization", NORMALIZATIONS)
    if normalization == "selected":
        return tf.nn.softmax(kept, axis=-1), tf.cast(expert_indices, tf.int32)
    probabilities = tf.nn.softmax(logits, axis=-1)
    gates = ops.pick(probabilities, expert_indices)
    return gates, tf.cast(expert_indices, tf.int32)


def prob_in_top_k(
    clean_logits: tf.Tensor,
    noisy_logits: tf.Tensor,
    stddev: tf.Tensor,
    k: int,
    largest: tuple[tf.Tensor, tf.Tensor] | None = None,
) -> tf.Tensor:
    """Probability that an expert stays chosen if only its noise is redrawn.

    $P(x, i) = \\Phi\\left(\\frac{(x W_g)_i -
    \\mathrm{kth\\_excluding}(H(x), k, i)}{\\mathrm{stddev}_i}\\right)$

    where kth_excluding is the k-th largest noisy logit once expert i is left
    out. Gradients flow through all three arguments, through the threshold too,
    as in the authors' code.

    Args:
        clean_logits: `(N, E)` float, without noise.
        noisy_logits: `(N, E)` float, from `noisy_logits`.
        stddev: `(N, E)` float, at least 0. Below the resolution of its type at 1
            (1.2e-7 for float32) it counts as that: so little noise is lost in the
            logits, and by equal logits the gradient would be infinite.
        k: Experts for each token, `1 <= k < E`.
        largest: What `largest_logits` returned for the noisy logits, if at hand.

    Returns:
        `(N, E)` float32 or float64 within [0, 1].

    Raises:
        ValueError: `k` is not below the number of experts: then every expert
            is always chosen and the probability is 1, with no gradient.

    Reference:
        Shazeer et al. 2017, equations 8 and 9.
    """
    clean_logits = as_gate_logits(clean_logits)
    noisy_logits = as_gate_logits(noisy_logits)
    num_experts = noisy_logits.shape[-1]
    _verify_k_below(k, num_experts)
    top_values, top_indices = largest or ops.top_k(noisy_logits, k + 1)
    threshold_if_in = top_values[..., k : k + 1]
    threshold_if_out = top_values[..., k - 1 : k]
    last_kept = top_indices[..., k - 1 : k]
    # A chosen expert counts as in, even if it ties with the next one. top_k
    # puts equal values in the order of their index, so the chosen ones among
    # those equal to the k-th value are those up to the k-th index.
    columns = tf.range(num_experts, dtype=top_indices.dtype)
    is_in = (noisy_logits > threshold_if_out) | (
        (noisy_logits == threshold_if_out) & (columns <= last_kept)
    )
    thresholds = tf.where(is_in, threshold_if_in, threshold_if_out)
    return _normal_cdf(clean_logits - thresholds, stddev)


def noisy_top_k_gating(
    clean_logits: tf.Tensor,
    raw_noise: tf.Tensor,
    noise: tf.Tensor,
    k: int,
    normalization: str = "selected",
    noise_epsilon: float = 1e-2,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The paper's gate in training, with what its load is made of.

    $H(x) = x W_g + \\mathrm{noise} \\cdot \\mathrm{Softplus}(x W_{noise})$,
    $G(x) = \\mathrm{Softmax}(\\mathrm{KeepTopK}(H(x), k))$

    `noise_stddev`, `noisy_logits`, `top_k_gating` and `prob_in_top_k` one after the
    other, sorting once.

    Args:
        clean_logits: `(N, E)` float, $x W_g$.
        raw_noise: `(N, E)` float, $x W_{noise}$.
        noise: `(N, E)` float, standard normal.
        k: Experts for each token, `1 <= k <= E`.
        normalization: As for `top_k_gating`.
        noise_epsilon: As for `noise_stddev`.

    Returns:
        gates: `(N, K)` float32 or float64, in descending order.
        expert_indices: `(N, K)` int32.
        prob_in_top_k: `(N, E)` float32 or float64, without gradient and 1 if
            k = E: every expert is always chosen.

    Raises:
        ValueError: As the four functions.

    Reference:
        Shazeer et al. 2017, equations 3 to 5, 8 and 9.
    """
    stddev = noise_stddev(raw_noise, noise_epsilon)
    noisy = noisy_logits(clean_logits, stddev, noise)
    return choose_noisy(clean_logits, noisy, stddev, k, normalization)


def choose_noisy(clean_logits, noisy, stddev, k, normalization):
    """The same from the noisy logits, and from a deviation of any origin."""
    if k == noisy.shape[-1]:
        gates, expert_indices = top_k_gating(noisy, k, normalization)
        return gates, expert_indices, tf.ones_like(noisy)
    # Not `largest_logits`: indices in the type they are computed in.
    largest = ops.top_k(noisy, k + 1)
    gates, expert_indices = top_k_gating(noisy, k, normalization, largest)
    probs = prob_in_top_k(clean_logits, noisy, stddev, k, largest)
    return gates, expert_indices, probs


def _verify_k_below(k, num_experts):
    if checks.verify_k(k, num_experts) == num_experts:
        raise ValueError(
            "`k` must be below the number of experts for a smooth load. "
            f"Received: k={k}, num_experts={num_experts}. Every expert is always "
            "chosen; count the tokens instead."
        )


@tf.custom_gradient
def _normal_cdf(difference, stddev):
    """CDF of the normal distribution of mean 0 at `difference`.

    The gradient divides the density, which far from 0 is exactly 0, by `stddev`:
    the order of operations of automatic differentiation overflows for a tiny
    `stddev`, and 0 times infinity is NaN.
    """
    # The gradient is at most 0.4 / stddev.
    stddev = tf.convert_to_tensor(stddev)
    stddev = tf.maximum(stddev, _LEAST_STDDEV[stddev.dtype])
    # Nothing is gained beyond 40 standard deviations, and the bound keeps
    # (clipped) infinite logits from overflowing.
    z = tf.clip_by_value(difference / stddev, -40.0, 40.0)

    def grad(dy):
        # 1 / sqrt(2 pi)
        density = tf.exp(-0.5 * z * z) * tf.constant(0.3989422804014327, z.dtype)
        d_difference = dy * density / stddev
        return d_difference, -z * d_difference

    return 0.5 * tf.math.erfc(-z * tf.constant(0.5**0.5, z.dtype)), grad


def make_gating_result(
    gates: tf.Tensor,
    expert_indices: tf.Tensor,
    num_experts: int,
    *,
    token_indices: tf.Tensor | None = None,
    load: tf.Tensor | None = None,
    mask: tf.Tensor | None = None,
) -> GatingResult:
    """Wraps chosen experts and their gates into what a gating layer returns.

    Args:
        gates: Float, `(N, K)`, or `(M,)` if tokens have different numbers of
            experts.
        expert_indices: int32 within [-1, E), shape of `gates`; -1 is no expert, where
            shapes are static.
        num_experts: E.
        token_indices: `(M,)` int32, ascending: the token of each assignment.
            Only for gates of shape `(M,)`.
        load: `(E,)` float, a smooth load that carries a gradient. None takes
            the hard counts, and the statistics are `CountedStatistics`.
        mask: `(N,)` bool or None. Tokens marked False are left out of the
            statistics.

    Returns:
        A `GatingResult` over all N tokens.

    Raises:
        ValueError: Shapes do not fit; outside of a graph, an expert is out of range.
    """
    expert_indices = tf.cast(expert_indices, tf.int32)
    verify_assignments(expert_indices, token_indices)
    counted = expert_indices
    if mask is not None:
        kept = (
            mask[:, tf.newaxis]
            if token_indices is None
            else tf.gather(mask, token_indices)
        )
        counted = tf.where(kept, expert_indices, -1)
    counts = losses.expert_counts(counted, num_experts)
    kind = CountedStatistics if load is None else GateStatistics
    statistics = kind(
        importance=losses.importance(gates, counted, num_experts),
        load=tf.cast(counts, gates.dtype) if load is None else load,
        counts=counts,
    )
    tokens = () if token_indices is None else tf.cast(token_indices, tf.int32)
    return GatingResult(gates, expert_indices, statistics, tokens)


def verify_assignments(expert_indices: tf.Tensor, token_indices: Any) -> None:
    """Raises unless experts are `(N, K)`, or `(M,)` with the tokens they are for."""
    rank = expert_indices.shape.rank
    if rank not in (1, 2) or (rank == 1) != (token_indices is not None):
        raise ValueError(
            "`expert_indices` must be (N, K) without `token_indices`, or (M,) with "
            f"it. Received: expert_indices.shape={expert_indices.shape}, "
            f"token_indices={'None' if token_indices is None else 'given'}."
        )
