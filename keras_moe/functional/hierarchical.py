"""Two levels of gates: groups, and experts within a group (appendix B)."""

import tensorflow as tf


def hierarchical_gates(
    primary_gates: tf.Tensor,
    group_indices: tf.Tensor,
    secondary_gates: tf.Tensor,
    secondary_indices: tf.Tensor,
    group_size: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Gates and experts of the flat mixture that two levels of gates make.

    $y_H = \\sum_i \\sum_j G_{primary}(x)_i \\cdot G_i(x)_j \\cdot E_{i,j}(x)$

    Expert j of group i has the flat index `i * group_size + j`. Summed over the
    tokens these gates are Importance_H (equation 13).

    Args:
        primary_gates: `(M,)` float, a gate for each (token, group) pair.
        group_indices: `(M,)` int32, the group of the pair, -1 for none.
        secondary_gates: `(M, K2)` float, gates within that group.
        secondary_indices: `(M, K2)` int32 within [0, group_size).
        group_size: Experts of one group.

    Returns:
        gates: `(M, K2)` float, the products.
        expert_indices: `(M, K2)` int32, flat indices, -1 for none.

    Reference:
        Shazeer et al. 2017, equations 12 and 13.
    """
    gates = primary_gates[:, tf.newaxis] * secondary_gates
    # In int64, which a GPU computes with.
    first = tf.cast(group_indices, tf.int64)[:, tf.newaxis] * group_size
    experts = first + tf.cast(secondary_indices, tf.int64)
    return gates, tf.cast(tf.maximum(experts, tf.constant(-1, tf.int64)), tf.int32)


def hierarchical_load(
    primary_load: tf.Tensor, secondary_load: tf.Tensor, group_counts: tf.Tensor
) -> tf.Tensor:
    """Smooth load of every expert of a hierarchical mixture.

    $\\mathrm{Load}_H(X)_{i,j} = \\frac{\\mathrm{Load}_{primary}(X)_i \\cdot
    \\mathrm{Load}_i(X^{(i)})_j}{|X^{(i)}|}$

    The load of the secondary gate alone would carry no gradient to the primary
    gate. $|X^{(i)}|$ is the true count and is held constant.

    Args:
        primary_load: `(G,)` float, load of the groups.
        secondary_load: `(G, b)` float, load within each group of the tokens
            that were sent there.
        group_counts: `(G,)` int32, tokens sent to each group.

    Returns:
        `(G * b,)` float, dtype of `secondary_load`. Zero for a group without
        tokens.

    Reference:
        Shazeer et al. 2017, equation 14.
    """
    counts = tf.cast(tf.stop_gradient(group_counts), secondary_load.dtype)
    share = tf.math.divide_no_nan(primary_load, counts)
    return tf.reshape(share[:, tf.newaxis] * secondary_load, [-1])


def choices_of_levels(primary: tuple, secondary: tuple) -> tuple:
    """`GatingResult.choices_kept` of both levels: over all decisions of a token.

    Those are one of the primary gate and one of each of its groups.

    Args:
        primary: That of the primary gate, `()` if it has no noise.
        secondary: That of the secondary gates, likewise.
    """
    if primary and secondary:
        return tuple(a + b for a, b in zip(primary, secondary, strict=True))
    return primary or secondary
