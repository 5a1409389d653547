"""Two experts a token, of which the second is not always used (GShard)."""

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional.gating import top_k_gating

SECOND_POLICIES = ("all", "random", "threshold")


def second_choice_gating(
    logits: tf.Tensor,
    policy: str = "all",
    uniform: tf.Tensor | None = None,
    threshold: float = 0.2,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The two best experts of each token, the second only if its gate is worth it.

    $g_1, g_2 = \\mathrm{Softmax}$ of the two largest logits. The second expert is used

    * with `"all"` always;
    * with `"random"` if $2 g_2$ is above a number drawn evenly from [0, 1): with
      probability $2 g_2$, since $g_2$ is at most 1/2;
    * with `"threshold"` if $g_2$ is above `threshold`.

    $g_1$ is the same either way.

    Args:
        logits: `(N, E)` float, E at least 2.
        policy: One of the three.
        uniform: `(N,)` float within [0, 1), for `"random"` only.
        threshold: For `"threshold"` only.

    Returns:
        gates: `(N, 2)` float32 or float64, the second 0 where it is not used.
        expert_indices: `(N, 2)` int32, the second -1 where it is not used.

    Raises:
        ValueError: `policy` is none of these, or numbers for `"random"` are missing.

    Reference:
        Lepikhin et al. 2020, "GShard", algorithm 1 and section 2.2 (random routing);
        the threshold is that of Mesh TensorFlow.
    """
    checks.verify_choice(policy, "policy", SECOND_POLICIES)
    gates, experts = top_k_gating(logits, 2)
    if policy == "all":
        return gates, experts
    second = tf.stop_gradient(gates[:, 1:])
    if policy == "threshold":
        used = second > threshold
    elif uniform is None:
        raise ValueError(
            '`uniform` must be given with policy="random". Received: uniform=None. Pass '
            "a number within [0, 1) for each token."
        )
    else:
        used = 2.0 * second > tf.cast(uniform, second.dtype)[:, tf.newaxis]
    used |= tf.range(2) == 0  # (N, 2)
    return (
        tf.where(used, gates, tf.zeros_like(gates)),
        tf.where(used, experts, -tf.ones_like(experts)),
    )
