"""The multiplicative attention of appendix G, and that of transformers."""

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional.ops import cast_up


def attention_keys(
    memory: tf.Tensor, key_kernel: tf.Tensor, scale: tf.Tensor
) -> tf.Tensor:
    """What of the scores depends on the memory alone: $V \\odot \\tanh(x U)$.

    Args:
        memory: `(batch, source, features)` float, the positions x to attend to.
        key_kernel: `(features, units)` float, U.
        scale: `(units,)` float, V.

    Returns:
        `(batch, source, units)`.

    Reference:
        Shazeer et al. 2017, equation 22.
    """
    return scale * tf.tanh(tf.matmul(memory, key_kernel))


def attention_scores(
    query: tf.Tensor, keys: tf.Tensor, query_kernel: tf.Tensor
) -> tf.Tensor:
    """Scores of all positions for all queries, in one matrix product.

    $A(x_i, y_j) = \\sum_d V_d \\tanh((x_i U)_d) \\tanh((y_j W)_d)$

    Args:
        query: `(batch, target, features)` float, the queries y.
        keys: `(batch, source, units)` float, from `attention_keys`.
        query_kernel: `(features, units)` float, W.

    Returns:
        `(batch, target, source)`.

    Reference:
        Shazeer et al. 2017, equation 22.
    """
    return tf.matmul(tf.tanh(tf.matmul(query, query_kernel)), keys, transpose_b=True)


def masked_softmax(scores: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Softmax over the last axis among the positions that are marked True.

    Args:
        scores: `(..., source)` float.
        mask: Bool tensor that broadcasts to `scores`, or None for all positions.

    Returns:
        The shape of `scores`. Exactly 0 where the mask is False; a row without
        any True is 0 throughout, and has no gradient.
    """
    if mask is None:
        return tf.nn.softmax(scores)
    mask = tf.broadcast_to(mask, tf.shape(scores))
    least = tf.constant(scores.dtype.min, scores.dtype)
    highest = tf.reduce_max(tf.where(mask, scores, least), axis=-1, keepdims=True)
    shifted = tf.where(mask, scores - tf.stop_gradient(highest), tf.zeros_like(scores))
    weights = tf.where(mask, tf.exp(shifted), tf.zeros_like(scores))
    return tf.math.divide_no_nan(
        weights, tf.reduce_sum(weights, axis=-1, keepdims=True)
    )


def dot_product_attention(
    query: tf.Tensor,
    keys: tf.Tensor,
    values: tf.Tensor,
    mask: tf.Tensor | None = None,
) -> tf.Tensor:
    """Scaled dot-product attention of all heads, of which some may share keys.

    $\\mathrm{softmax}(q K^T / \\sqrt{H}) V$ for each head. Query head n takes the keys
    and values of group $\\lfloor n / (N / G) \\rfloor$.

    Args:
        query: `(B, T, N, H)` float, N heads.
        keys: `(B, S, G, H)` float; G divides N.
        values: `(B, S, G, V)` float.
        mask: Bool tensor that broadcasts to `(B, T, S)`, or None: True where a query
            may attend to a position. Defaults to `None`.

    Returns:
        `(B, T, N, V)`, in the type of `values`. Zero for a query that may attend to
        nothing. The softmax runs in float32 at least.

    Reference:
        Vaswani et al. 2017, "Attention is all you need", equation 1; Ainslie et al.
        2023, "GQA: Training generalized multi-query transformer models", section 2.2.
    """
    heads, groups = query.shape[2], keys.shape[2]
    if not groups or not heads or heads % groups:
        raise ValueError(
            "`query` must have a multiple of the heads of `keys`. Received: "
            f"query.shape={query.shape}, keys.shape={keys.shape}. Give each group of "
            "heads as many queries."
        )
    if mask is not None:
        sizes = query.shape[0], query.shape[1], keys.shape[1]
        mask = checks.verify_broadcast(mask, sizes, "mask")
    shape = tf.shape(query)
    query = query * tf.cast(query.shape[-1] ** -0.5, query.dtype)
    query = tf.reshape(
        query, [shape[0], shape[1], groups, heads // groups, query.shape[-1]]
    )
    scores = cast_up(tf.einsum("btgrh,bsgh->bgrts", query, keys))
    if mask is not None:
        mask = mask[:, tf.newaxis, tf.newaxis]  # (B, T, S) -> (B, G, N/G, T, S)
    weights = tf.cast(masked_softmax(scores, mask), values.dtype)
    outputs = tf.einsum("bgrts,bsgv->btgrv", weights, values)
    return tf.reshape(outputs, [shape[0], shape[1], heads, values.shape[-1]])


def rotary_embedding(
    x: tf.Tensor, positions: tf.Tensor, max_wavelength: float = 10000.0
) -> tf.Tensor:
    """Turns pairs of features by angles that grow with the position.

    $x_i' = x_i \\cos(m\\theta_i) - x_{i+H/2} \\sin(m\\theta_i)$,
    $x_{i+H/2}' = x_{i+H/2} \\cos(m\\theta_i) + x_i \\sin(m\\theta_i)$,
    $\\theta_i = \\lambda^{-2i/H}$ at position m, for i below H/2. The product of two
    turned vectors depends on the difference of their positions alone.

    Args:
        x: `(B, T, N, H)` float, queries or keys; H is even.
        positions: `(B, T)` or `(1, T)` int.
        max_wavelength: Float, $\\lambda$. The slowest pair turns once in somewhat less
            than $2\\pi\\lambda$ positions. Defaults to `10000.0`.

    Returns:
        The shape and type of `x`. Angles are float32 at least.

    Raises:
        ValueError: H is odd.

    Reference:
        Su et al. 2021, "RoFormer: Enhanced transformer with rotary position embedding",
        equation 34, with the two features of a pair H/2 apart, as in most models since.
    """
    features = x.shape[-1]
    if features is None or features % 2:
        raise ValueError(
            "The last dimension of `x` must be even: features are turned in pairs. "
            f"Received: x.shape={x.shape}. Choose an even number of features a head."
        )
    exact = cast_up(x)
    pairs = tf.range(features // 2)
    exponents = tf.cast(pairs, exact.dtype) * (-2.0 / features)
    frequencies = tf.constant(max_wavelength, exact.dtype) ** exponents
    # (B, T) -> (B, T, 1, H / 2)
    angles = tf.cast(positions, exact.dtype)[..., tf.newaxis, tf.newaxis] * frequencies
    cos, sin = tf.cos(angles), tf.sin(angles)
    first, second = tf.split(exact, 2, axis=-1)
    turned = tf.concat(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return tf.cast(turned, x.dtype)
