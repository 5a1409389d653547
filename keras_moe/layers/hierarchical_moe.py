"""The hierarchical mixture: a gate over groups, and one within each group."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, placement
from keras_moe.layers import configs
from keras_moe.layers.balance_metric import add_balance
from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.group_exchange import mix_at_groups
from keras_moe.layers.hierarchical_gating import (
    HierarchicalGating,
    verify_groups,
    verify_two_ks,
    with_primary_gating,
)
from keras_moe.layers.moe import MoE


@keras.saving.register_keras_serializable(package="keras_moe")
class HierarchicalMoE(MoE):
    """A Mixture-of-Experts layer with two levels of gates.

    $y_H = \\sum_i \\sum_j G_{primary}(x)_i \\cdot G_i(x)_j \\cdot E_{i,j}(x)$
    (equation 12). The experts stand in `num_groups` groups. A primary gate picks
    groups, a secondary gate of each picked group picks experts. With thousands
    of experts this keeps the gates cheap: 4,096 experts in 64 groups take two
    gates of 64 instead of one of 4,096.

    Losses are taken over all experts of all groups, from importance and load of
    equations 13 and 14.

    Args:
        experts: As for `MoE`; expert j of group i has the index
            `i * (num_experts / num_groups) + j`.
        num_groups: Int. Groups, which share the experts equally.
        k: Two ints: groups for each token, and experts in each group. Defaults
            to `(2, 2)`.
        primary_gating: The gate over the groups, a layer that returns a
            `GatingResult`. None means `NoisyTopKGating(k[0])`. Defaults to
            `None`.
        importance_loss_weight: Float. Weight of the importance loss. Defaults
            to `0.1`.
        load_loss_weight: Float. Weight of the load loss. Defaults to `0.1`.
        activation: Activation of the combined output. Defaults to `None`.
        capacity_factor: Float or None. As for `MoE`; the layer is not compiled
            with XLA either way. Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(..., features)`.
        mask: Bool tensor of the leading dimensions, or None. Tokens marked
            False (padding) are neither routed nor counted.
        training: Bool. Whether the gates add their noise.

    Input shape:
        `(..., features)`, rank 2 or more.

    Output shape:
        `(..., output_units)` of the experts, by default the input shape.

    Losses and state:
        As for `MoE`.

    On several devices each group lives on one of them with its secondary gate:
    the primary gate sends a token to its groups, and the secondary gate, the
    experts and their sum run there (section 3.1).

    Raises:
        ValueError: As for `MoE`; the number of experts is not a multiple of
            `num_groups`; `k` is not two ints within the number of groups and
            their size.

    Example:

    >>> layer = keras_moe.layers.HierarchicalMoE(
    ...     keras_moe.layers.FeedForwardExperts(64, hidden_units=32),
    ...     num_groups=8,
    ... )
    >>> layer(np.ones((2, 5, 16), "float32")).shape.as_list()
    [2, 5, 16]

    Reference:
        Shazeer et al. 2017, appendix B.
    """

    def __init__(
        self,
        experts: keras.layers.Layer,
        num_groups: int,
        *,
        k: Sequence[int] = (2, 2),
        primary_gating: keras.layers.Layer | None = None,
        importance_loss_weight: float = 0.1,
        load_loss_weight: float = 0.1,
        activation: Any = None,
        capacity_factor: float | None = None,
        **kwargs: Any,
    ):
        num_groups = checks.verify_positive_int(num_groups, "num_groups")
        k = verify_two_ks(k)
        if hasattr(experts, "num_experts"):
            verify_groups(experts.num_experts, num_groups, k)
        # A policy of the layer, if given, is that of its gates too.
        gating = HierarchicalGating(
            num_groups, k, primary_gating=primary_gating, dtype=kwargs.get("dtype")
        )
        super().__init__(
            experts,
            gating,
            importance_loss_weight=importance_loss_weight,
            load_loss_weight=load_loss_weight,
            activation=activation,
            capacity_factor=capacity_factor,
            **kwargs,
        )
        self.num_groups = num_groups
        self.k = k
        self.primary_gating = primary_gating

    def build(self, input_shape):
        num_replicas = placement.for_weights().num_replicas
        if num_replicas > 1 and not isinstance(self.experts, FeedForwardExperts):
            raise ValueError(
                "`experts` of HierarchicalMoE must be FeedForwardExperts on several "
                "devices, which hold one group's weights together. Received: "
                f"{type(self.experts).__name__} on {num_replicas} replicas. Use "
                "FeedForwardExperts, or `MoE`."
            )
        if isinstance(self.experts, FeedForwardExperts):
            self._keep_groups_together(num_replicas)
        super().build(input_shape)

    def _keep_groups_together(self, num_replicas):
        group_size = self.num_experts // self.num_groups
        if (
            num_replicas > 1
            and self.experts.built
            and self.experts.group_size != group_size
        ):
            raise ValueError(
                "`experts` must not be built before the HierarchicalMoE on several "
                "devices, which then may split groups. Received: experts built in "
                f"groups of {self.experts.group_size}, {group_size} experts a group. "
                "Pass them unbuilt."
            )
        self.experts.group_size = group_size

    def _mix(self, tokens, mask, training):
        if placement.for_call().num_replicas == 1:
            return super()._mix(tokens, mask, training)
        if self.on_routing is not None:
            raise ValueError(
                f"{self.name}: the routing of a hierarchical mixture is not known on "
                "the device of a token. Received: recorded_routing on "
                f"{placement.for_call().num_replicas} replicas. Record it outside of "
                "`strategy.run`."
            )
        outputs, statistics, losses = mix_at_groups(self, tokens, training)
        add_balance(self, statistics, tf.constant(0))
        for loss in losses:
            self.add_loss(loss)
        return outputs, None

    def get_config(self):
        config = super().get_config()
        del config["gating"]
        primary = self.primary_gating
        return {
            **config,
            "num_groups": self.num_groups,
            "k": list(self.k),
            "primary_gating": configs.serialize(self.gating, primary),
        }

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        config = with_primary_gating(config)
        experts = configs.deserialize(config["experts"])
        return cls(**{**config, "experts": experts})
