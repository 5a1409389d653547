"""What a recurrent mixture asks of its gate."""

from keras_moe.types import GatingResult


def verify_recurrent_gating(chosen: GatingResult) -> None:
    """Raises unless a gate can be used inside a recurrence.

    Args:
        chosen: What the gate returned.

    Raises:
        ValueError: It is no `GatingResult`, tokens have different numbers of experts,
            or the gate has losses of its own.
    """
    if not isinstance(chosen, GatingResult):
        raise ValueError(
            "`gating` of a recurrent mixture must return a "
            f"keras_moe.types.GatingResult. Received: a {type(chosen).__name__}. Use "
            "NoisyTopKGating, TopKGating or SoftmaxGating."
        )
    if chosen.is_ragged or chosen.auxiliary_losses:
        raise ValueError(
            "`gating` of a recurrent mixture must give every token the same number "
            "of experts and have no losses of its own, such as the router z-loss. "
            f"Received: a gate with gates of rank {chosen.gates.shape.rank} and "
            f"{len(chosen.auxiliary_losses)} auxiliary losses. Use NoisyTopKGating, "
            "TopKGating or SoftmaxGating, with `z_loss_weight` and "
            "`switch_loss_weight` left out."
        )
