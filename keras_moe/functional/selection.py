"""What a gate has decided, as a table of tokens and experts."""

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional import ops
from keras_moe.functional.gating import make_gating_result
from keras_moe.types import GatingResult


def make_selection_result(
    gates: tf.Tensor,
    selected: tf.Tensor,
    *,
    most_experts: int | None = None,
    load: tf.Tensor | None = None,
    mask: tf.Tensor | None = None,
) -> GatingResult:
    """Wraps a table of gates into what a gating layer returns, wherever it runs.

    For gates that give tokens different numbers of experts: assignments `(M,)` with
    their tokens on one device and on replicas; where shapes are static (XLA, GPUs, a
    mesh) columns, in which expert -1 stands for none.

    Args:
        gates: `(N, E)` float.
        selected: `(N, E)` bool. Which experts take which token.
        most_experts: Int or None. The most that a token has, if it is less than E: a
            further one, of higher index, is left out. A gate with this attribute takes
            a `capacity_factor`, by which the choices of a token are in the order of
            the experts. Defaults to `None`.
        load: As for `make_gating_result`. Defaults to `None`.
        mask: `(N,)` bool or None. Tokens marked False have no expert. Defaults to
            `None`.

    Returns:
        A `GatingResult` over all N tokens.

    Raises:
        ValueError: Shapes do not fit; `most_experts` is not within [1, E].
    """
    checks.verify_shape(gates.shape, "a value for each gate", selected=selected)
    num_experts = gates.shape[1]
    most = num_experts
    if most_experts is not None:
        most = checks.verify_k(most_experts, num_experts)
    if mask is not None:
        selected &= mask[:, tf.newaxis]
    if most < num_experts:
        selected &= tf.cumsum(tf.cast(selected, tf.int32), axis=1) <= most
    experts = tf.range(num_experts) + tf.zeros_like(selected, tf.int32)
    if not ops.results_are_static():
        assignments = tf.where(selected)  # (M, 2), in the order of the tokens
        return make_gating_result(
            tf.gather_nd(gates, assignments),
            tf.gather_nd(experts, assignments),
            num_experts,
            token_indices=tf.cast(assignments[:, 0], tf.int32),
            load=load,
        )
    experts = tf.where(selected, experts, -tf.ones_like(experts))
    gates = tf.where(selected, gates, tf.zeros_like(gates))
    if most < num_experts:
        # Those selected first, in the order of the experts.
        keys = tf.cast(
            tf.where(selected, num_experts - experts, experts * 0), gates.dtype
        )
        _, places = ops.top_k(tf.stop_gradient(keys), most)
        experts = tf.cast(ops.pick(tf.cast(experts, gates.dtype), places), tf.int32)
        gates = ops.pick(gates, places)
    return make_gating_result(gates, experts, num_experts, load=load)
