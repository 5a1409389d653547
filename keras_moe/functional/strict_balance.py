"""Strictly balanced gating: every expert gets the same number of tokens (appendix F).

Two masks select from the softmax gates: in training the m largest of each expert's
column over the batch, at inference those above a threshold that each expert has
learned. Both are constants to the gradient.
"""

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import ops
from keras_moe.functional.gating import as_gate_logits


def tokens_per_expert(
    num_tokens: tf.Tensor | int, num_experts: int, k: int
) -> tf.Tensor:
    """Tokens that each expert takes in training: $m = k |X| / n$, rounded.

    Paper: the rounding is left open. Here to the nearest whole number, halves
    up, in whole numbers throughout. At least 1 if there is a token, so that no
    expert is left out of a small batch (a token then has more than k experts on
    average), and never more than the tokens.

    Args:
        num_tokens: N, an int or a scalar integer tensor.
        num_experts: E.
        k: Experts of a token on average, `1 <= k <= E`.

    Returns:
        `()` int32 within [0, N]; 0 for an empty batch only.

    Raises:
        ValueError: `num_experts` or `k` is out of range.

    Reference:
        Shazeer et al. 2017, equation 18.
    """
    k = checks.verify_k(k, num_experts)
    num_tokens = tf.cast(num_tokens, tf.int64)
    nearest = (2 * k * num_tokens + num_experts) // (2 * num_experts)
    return tf.cast(tf.minimum(tf.maximum(nearest, 1), num_tokens), tf.int32)


def batchwise_mask(gates: tf.Tensor, m: tf.Tensor | int) -> tf.Tensor:
    """Selects the m largest values of every column, over the whole batch.

    $M_{batchwise}(X, m)_{j,i} = 1$ if $X_{j,i}$ is among the m largest of column
    i, else 0. Among equal values the token of lower index wins, so every column
    has exactly m.

    Args:
        gates: `(N, E)` float, the softmax gates of all tokens.
        m: Tokens of each expert, at least 0, an int or a scalar int32 tensor;
            more than N selects all N.

    Returns:
        `(N, E)` bool. No gradient.

    Raises:
        ValueError: `gates` is not of rank 2.

    Reference:
        Shazeer et al. 2017, equation 18.
    """
    gates = _verify_gates(gates)
    return ops.largest_of_columns(gates, tf.cast(m, tf.int32))


def threshold_mask(gates: tf.Tensor, thresholds: tf.Tensor) -> tf.Tensor:
    """Selects what exceeds the threshold of its expert.

    $M_{threshold}(x, T)_i = 1$ if $x_i > T_i$, else 0. What a token gets does
    not depend on the others.

    Args:
        gates: `(N, E)` float, the softmax gates of all tokens.
        thresholds: `(E,)` float.

    Returns:
        `(N, E)` bool. No gradient.

    Raises:
        ValueError: `gates` is not of rank 2, or `thresholds` does not fit.

    Reference:
        Shazeer et al. 2017, equation 19.
    """
    gates = _verify_gates(gates)
    return gates > _verify_thresholds(thresholds, gates)


def masked_gating(logits: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Softmax gates of the selected experts, normalised for each token.

    $G(x)_i = \\frac{G_\\sigma(x)_i M_i}{\\sum_j G_\\sigma(x)_j M_j}$

    The quotient is formed as a softmax over the selected logits, which is the
    same and cannot become 0 / 0 where softmax gates vanish.

    Paper: a token that no expert has selected is left open (0 / 0). Here all
    its gates are zero.

    Args:
        logits: `(N, E)` float, $x W_g$.
        mask: `(N, E)` bool, from `batchwise_mask` or `threshold_mask`.

    Returns:
        `(N, E)` float32 (float64 for float64 logits). Rows sum to 1, or to 0
        where nothing is selected; gradients are finite in both cases.

    Reference:
        Shazeer et al. 2017, equations 15 and 16.
    """
    logits = as_gate_logits(logits)
    selected = tf.where(mask, logits, logits.dtype.min)
    # The outer mask turns the uniform softmax of an empty row into zeros.
    gates = tf.nn.softmax(selected, axis=-1)
    return tf.where(mask, gates, tf.zeros_like(gates))


def threshold_loss(
    gates: tf.Tensor,
    thresholds: tf.Tensor,
    m: tf.Tensor | int,
    selected: tf.Tensor | None = None,
) -> tf.Tensor:
    """Trains the thresholds to select what the batchwise mask selects.

    $L(X, T, m) = \\sum_j \\sum_i (M_{threshold}(X_j, T)_i -
    M_{batchwise}(X, m)_{j,i}) (X_{j,i} - T_i)$

    No term is negative, and all are zero if the masks agree. Masks are constants,
    so the gradient for $T_i$ is the number of tokens of the batchwise mask minus
    that of the threshold: a threshold that lets too many in rises. Any value
    between the m-th and the (m + 1)-th largest gate of an expert is optimal.

    Paper: whether the loss trains the gate as well is left open. Here it does
    not: no gradient reaches `gates`.

    Args:
        gates: `(N, E)` float, the softmax gates of all tokens.
        thresholds: `(E,)` float.
        m: Tokens of each expert, an int or a scalar int32 tensor.
        selected: `(N, E)` bool, the batchwise mask, where it is known already or
            belongs to a larger batch of which `gates` is a part. None takes
            `batchwise_mask(gates, m)`. Defaults to `None`.

    Returns:
        `()` float32 or float64, the sum over tokens and experts, at least 0 if
        `selected` is the mask of `gates`.

    Raises:
        ValueError: `gates` is not of rank 2, or `thresholds` does not fit.

    Reference:
        Shazeer et al. 2017, equation 20.
    """
    gates = tf.stop_gradient(_verify_gates(gates))
    thresholds = _verify_thresholds(thresholds, gates)
    if selected is None:
        selected = batchwise_mask(gates, m)
    excess = tf.cast(threshold_mask(gates, thresholds), gates.dtype) - tf.cast(
        selected, gates.dtype
    )
    return tf.reduce_sum(excess * (gates - thresholds))


def _verify_gates(gates):
    gates = tf.convert_to_tensor(gates)
    if gates.shape.rank != 2:
        raise ValueError(
            "`gates` must be (tokens, experts). Received: "
            f"gates.shape={gates.shape}. Flatten the leading dimensions."
        )
    return ops.cast_up(gates)


def _verify_thresholds(thresholds, gates):
    thresholds = tf.cast(thresholds, gates.dtype)
    if not thresholds.shape.is_compatible_with(gates.shape[1:]):
        raise ValueError(
            "`thresholds` must have one value for each expert. Received: "
            f"thresholds.shape={thresholds.shape}, gates.shape={gates.shape}."
        )
    return thresholds
