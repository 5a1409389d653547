"""The hierarchical mixture: a gate over groups, and one within each group."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe import checks, engine
from keras_moe.layers import configs
from keras_moe.layers.balance_losses import add_balance
from keras_moe.layers.base_experts import Experts
from keras_moe.layers.group_checks import verify_groups, verify_two_ks
from keras_moe.layers.hierarchical_gating import (
    HierarchicalGating,
    with_primary_gating,
)
from keras_moe.layers.moe import MoE, with_capacity_of_evaluation

# Arguments that both the layer and its gates have.
_SHARED = ("normalization", "noise_stddev", "z_loss_weight")


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
        k: Two ints: groups for each token, and experts in each group. None means
            `(2, 2)`, or as many as there are. Defaults to `None`.
        primary_gating: The gate over the groups, a layer that returns a
            `GatingResult`. None means `NoisyTopKGating(k[0])`. Defaults to
            `None`.
        normalization: `"selected"` or `"all"`, as for `NoisyTopKGating`, for both
            levels, or two of them, for the primary gate that is left out and for
            the secondary gates. A level of `k=1` learns from the task with `"all"`
            only. Defaults to `"selected"`.
        use_gate_bias: Bool. Whether the gates, but for a given `primary_gating`,
            have a bias. Defaults to `False`.
        noise_stddev: As for `HierarchicalGating`: the standard deviation of the noise
            of the gates, but for a given `primary_gating`. Defaults to `"learned"`.
        z_loss_weight: Float. Weight of the router z-loss in training, of the logits of
            these gates (`functional.router_z_loss`). Defaults to `0.0`.
        importance_loss_weight: Float or None. Weight of the importance loss. None
            means 0.1. Defaults to `None`.
        load_loss_weight: Float or None. Weight of the load loss. None means 0.1
            where the load is smooth, else 0, as for `MoE`. Defaults to `None`.
        activation: Activation of the combined output. Defaults to `None`.
        capacity_factor: Float or None. As for `MoE`. Defaults to `None`.
        evaluation_capacity_factor: Float or None. As for `MoE`. Defaults to `None`.
        losses_in_evaluation: Bool. As for `MoE`. Defaults to `False`.
        shared_experts: A layer or None. As for `MoE`. Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(..., features)`.
        mask: Bool tensor of the leading dimensions, or None. Tokens marked
            False (padding) are neither routed nor counted.
        training: Bool. Whether the gates add their noise and the layer its losses.

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
        k: Sequence[int] | None = None,
        primary_gating: keras.layers.Layer | None = None,
        normalization: str | Sequence[str] = "selected",
        use_gate_bias: bool = False,
        noise_stddev: Any = "learned",
        z_loss_weight: float = 0.0,
        importance_loss_weight: float | None = None,
        load_loss_weight: float | None = None,
        activation: Any = None,
        capacity_factor: float | None = None,
        evaluation_capacity_factor: float | None = None,
        losses_in_evaluation: bool = False,
        shared_experts: keras.layers.Layer | None = None,
        **kwargs: Any,
    ):
        num_groups = checks.verify_positive_int(num_groups, "num_groups")
        num_experts = getattr(experts, "num_experts", 2 * num_groups)
        if k is None:
            k = min(2, num_groups), max(1, min(2, num_experts // num_groups))
        k = verify_two_ks(k)
        verify_groups(num_experts, num_groups, k)
        # A policy of the layer, if given, is that of its gates too.
        gating = HierarchicalGating(
            num_groups,
            k,
            primary_gating=primary_gating,
            normalization=normalization,
            use_bias=use_gate_bias,
            noise_stddev=noise_stddev,
            z_loss_weight=z_loss_weight,
            dtype=kwargs.get("dtype"),
        )
        super().__init__(
            experts,
            gating,
            importance_loss_weight=importance_loss_weight,
            load_loss_weight=load_loss_weight,
            activation=activation,
            capacity_factor=capacity_factor,
            evaluation_capacity_factor=evaluation_capacity_factor,
            losses_in_evaluation=losses_in_evaluation,
            shared_experts=shared_experts,
            **kwargs,
        )
        self.num_groups = num_groups
        self.k = k
        self.primary_gating = primary_gating
        self.normalization = normalization
        self.use_gate_bias = gating.use_bias
        self.noise_stddev = gating.noise_stddev
        self.z_loss_weight = gating.z_loss_weight

    def build(self, inputs_shape, gate_inputs_shape=None):
        # Experts of another kind run on all rows of theirs, on one device of all.
        self.gating.groups_are_shared_by_all = not isinstance(self.experts, Experts)
        if isinstance(self.experts, Experts):
            self._keep_groups_together(engine.for_weights().replicas.number)
        super().build(inputs_shape, gate_inputs_shape)

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

    def _mix(self, dispatcher, tokens, gate_tokens, mask, training):
        here = engine.current()
        if here.hierarchical_mixture is None:
            return super()._mix(dispatcher, tokens, gate_tokens, mask, training)
        if self.on_routing is not None:
            raise ValueError(
                f"{self.name}: the routing of a hierarchical mixture is not known on "
                "the device of a token. Received: recorded_routing on "
                f"{here.devices}. Record it outside of "
                "`strategy.run`."
            )
        outputs, overflow, statistics, losses, kept = here.hierarchical_mixture(
            self, tokens, gate_tokens, training, dispatcher.capacity
        )
        add_balance(self, statistics, training, losses, overflow, choices_kept=kept)
        return outputs, None

    def get_config(self):
        config = super().get_config()
        del config["gating"]
        primary, of_gates = self.primary_gating, self.gating.get_config()
        return {
            **config,
            "num_groups": self.num_groups,
            "k": list(self.k),
            "primary_gating": configs.serialize(self.gating, primary),
            **{name: of_gates[name] for name in _SHARED},
            "use_gate_bias": self.use_gate_bias,
        }

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        config = with_capacity_of_evaluation(with_primary_gating(config))
        experts = configs.deserialize(config["experts"])
        shared = configs.deserialize(config.get("shared_experts"))
        return cls(**{**config, "experts": experts, "shared_experts": shared})
