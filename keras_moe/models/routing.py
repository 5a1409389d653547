"""Routing as arrays to look at."""

import numpy as np
import tensorflow as tf

from keras_moe.types import GatingResult


def routing_of(
    result: GatingResult, leading_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Experts and gates of every token.

    Args:
        result: Of a gate, over the flattened tokens.
        leading_shape: Their shape before they were flattened.

    Returns:
        expert_indices: `(*leading_shape, k)` int32, `-1` where a token has
            fewer than k experts.
        gates: The same shape, float, 0 there.
    """
    plan = result.plan
    experts, gates = plan.expert_indices, result.gates
    if plan.positions.shape.rank == 1:
        tokens = tf.gather(plan.token_indices, plan.positions)
        num_tokens = int(np.prod(leading_shape))

        def padded(values, filling):
            ragged = tf.RaggedTensor.from_value_rowids(values, tokens, num_tokens)
            return ragged.to_tensor(filling)

        experts, gates = padded(experts, -1), padded(gates, 0)
    shape = (*leading_shape, experts.shape[-1])
    return tf.reshape(experts, shape).numpy(), tf.reshape(gates, shape).numpy()
