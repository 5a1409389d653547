"""The balancing (auxiliary) losses of a call, added to the layer that made it."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from keras_moe import engine, functional
from keras_moe.layers.gate_contract import has_load_loss
from keras_moe.types import GateStatistics


def add_balance(
    layer: keras.layers.Layer,
    statistics: GateStatistics,
    training: bool | None,
    own_losses: Sequence[tf.Tensor] = (),
    overflow: tf.Tensor | int = 0,
    entropy: Callable[[], tuple[tf.Tensor, tf.Tensor]] | None = None,
    choices_kept: Sequence[tf.Tensor] = (),
) -> None:
    """Adds the balancing losses of one call, and hands its statistics on.

    Args:
        layer: Has `num_experts`, `gating`, `losses_in_evaluation` and the weights of
            `set_loss_weights`, and, with several experts, the `BalanceMetric`
            `balance`.
        statistics: `GateStatistics` of the call.
        training: That of the call. Losses are added in training, and otherwise if
            `losses_in_evaluation` says so.
        own_losses: Losses of the gate's own, added likewise. Defaults to none.
        overflow: `()` int32, assignments dropped. Defaults to 0.
        entropy: Gives those of `functional.gate_entropy`, if they are known.
        choices_kept: That of the `GatingResult`. Defaults to none.
    """
    importance, load, _ = statistics
    with_load_loss = has_load_loss(layer, statistics)
    replicas = engine.current().replicas
    if replicas.number > 1 and layer.num_experts > 1:
        # Over the global batch: the squared variation is not linear.
        (importance, load, counts), kept = _summed(replicas, statistics, choices_kept)
        # Each replica notes its share: its own figures are then those of all, and
        # so is the sum over the replicas, which Python reads.
        *shares, choices_kept = (
            tf.cast(x, tf.float64) / replicas.number
            for x in (importance, load, counts, kept)
        )
        statistics = GateStatistics(*shares)
        choices_kept = tf.unstack(choices_kept)
    if training or layer.losses_in_evaluation:
        weight = layer.importance_loss_weight
        if weight:
            layer.add_loss(functional.importance_loss(importance, weight))
        if with_load_loss:
            layer.add_loss(functional.load_loss(load, layer.load_loss_weight))
        for loss in own_losses:
            layer.add_loss(loss)
    if layer.num_experts > 1:  # a single expert has nothing to balance
        layer.balance.record(statistics, overflow, entropy, training, choices_kept)


def _summed(replicas, statistics, choices_kept):
    """Statistics `(3, E)` and choices kept `(2,)` or `(0,)` over all replicas."""
    importance, load, counts = statistics
    own = tf.stack([importance, load, tf.cast(counts, importance.dtype)])
    kept = [tf.cast(x, own.dtype)[tf.newaxis] for x in choices_kept]
    # By one exchange.
    sums = replicas.sum(tf.concat([tf.reshape(own, [-1]), *kept], axis=0))
    size = own.shape.num_elements()
    return tf.unstack(tf.reshape(sums[:size], own.shape)), sums[size:]
