"""A gate of two levels: over groups, and within each group."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers import configs
from keras_moe.layers.base_gating import Choice, _Gating
from keras_moe.layers.gate_contract import verify_gating_result
from keras_moe.layers.group_checks import (
    share_num_groups,
    two_normalizations,
    verify_groups,
    verify_two_ks,
)
from keras_moe.layers.hierarchical_static import hierarchical_gating
from keras_moe.layers.initializers import PerExpertInitializer
from keras_moe.layers.noise import LEARNED, NoiseLevel, draw_rows
from keras_moe.layers.noisy_gating import NoisyTopKGating
from keras_moe.layers.secondary_gates import SecondaryGates, choose, with_levels
from keras_moe.types import GatingResult


@keras.saving.register_keras_serializable(package="keras_moe")
class HierarchicalGating(_Gating):
    """A gate (router) of two levels: k1 groups, then k2 experts in each.

    $G(x)_{i,j} = G_{primary}(x)_i \\cdot G_i(x)_j$ (equation 12). A token meets
    the primary gate over the groups and the secondary gates of its own groups
    only, so the cost grows with `num_groups + k1 * group size` and not with the
    number of experts.

    The secondary gates are noisy top-k gates, one for each group, with their
    weights stacked. Used inside `HierarchicalMoE`.

    Args:
        num_groups: Int. Groups, which share the experts equally.
        k: Two ints: groups for each token, and experts in each group. Defaults
            to `(2, 2)`.
        num_experts: Int or None. Number of experts of all groups; None takes it
            from the experts of the surrounding layer. Defaults to `None`.
        primary_gating: The gate over the groups, a layer that returns a
            `GatingResult`; its own `k` then counts. None means
            `NoisyTopKGating(k[0])`. Defaults to `None`.
        normalization: `"selected"` or `"all"`, as for `NoisyTopKGating`, for both
            levels, or two of them, for the primary gate that is left out and for
            the secondary gates. Defaults to `"selected"`.
        noise_stddev: `"learned"`, a float or a schedule, as for `NoisyTopKGating`: the
            standard deviation of the noise of the secondary gates, and of a primary
            gate that is left out. A schedule needs a primary gate with a
            `gate_kernel`, by which steps are counted. Defaults to `"learned"`.
        noise_epsilon: Float. Least standard deviation of the secondary noise.
            Defaults to `1e-2`.
        gate_initializer: Initial value of the secondary `gate_kernel`. Defaults
            to `"zeros"`.
        noise_initializer: Initial value of the secondary `noise_kernel`.
            Defaults to `"zeros"`.
        use_bias: Bool. Whether the clean logits of the secondary gates, and of a
            primary gate that is left out, have a bias. Defaults to `False`.
        z_loss_weight: Float. Weight of the router z-loss in training
            (`functional.router_z_loss`), of the logits of the secondary gates of a
            token's groups, and of a primary gate that is left out. Defaults to `0.0`.
        seed: Int or None. Seed of the secondary noise. Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Bool. True adds the noise, and losses that have a weight, on both
            levels.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, k1 * k2)` float32, the chosen experts,
        the statistics over all experts.

    Losses and state:
        Weights of the primary gate; `gate_kernel` and, if the noise is learned,
        `noise_kernel`, each `(num_groups, features, group size)`, and with `use_bias`
        `gate_bias` `(num_groups, group size)`; with a schedule the number of steps.
        `auxiliary_losses` holds those of the primary gate and the z-loss of the
        secondary ones. The load is that of equation 14 in training, a hard count
        otherwise.

    Raises:
        ValueError: `num_experts` is not a multiple of `num_groups`; `k` is not
            two ints within the number of groups and their size; the primary
            gate has another number of experts than `num_groups`; `noise_stddev` is
            negative or of another kind, or a schedule without steps to count.

    Example:

    >>> gating = keras_moe.layers.HierarchicalGating(4, k=(2, 1), num_experts=12)
    >>> result = gating(np.ones((3, 8), "float32"))
    >>> result.gates.shape.as_list()
    [3, 2]

    Reference:
        Shazeer et al. 2017, appendix B.
    """

    def __init__(
        self,
        num_groups: int,
        k: Sequence[int] = (2, 2),
        num_experts: int | None = None,
        *,
        primary_gating: keras.layers.Layer | None = None,
        normalization: str | Sequence[str] = "selected",
        noise_stddev: Any = LEARNED,
        noise_epsilon: float = 1e-2,
        gate_initializer: Any = "zeros",
        noise_initializer: Any = "zeros",
        use_bias: bool = False,
        z_loss_weight: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ):
        num_groups = checks.verify_positive_int(num_groups, "num_groups")
        noise = NoiseLevel(noise_stddev, noise_epsilon)
        k = verify_two_ks(k)
        of_primary, of_secondary = two_normalizations(normalization)
        super().__init__(
            num_experts,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            z_loss_weight=z_loss_weight,
            **kwargs,
        )
        if primary_gating is None:
            primary_gating = NoisyTopKGating(
                k[0],
                normalization=of_primary,
                noise_stddev=noise.stddev,
                use_bias=use_bias,
                z_loss_weight=z_loss_weight,
                dtype=self.dtype_policy,
            )
        self.num_groups = num_groups
        self.k = k
        self.normalization = normalization
        self.secondary_normalization = of_secondary
        self.primary_gating = primary_gating
        self._noise = noise
        self.noise_stddev = noise.stddev
        self.noise_epsilon = noise.epsilon
        self.noise_initializer = keras.initializers.get(noise_initializer)
        self.seed = seed = checks.verify_seed(seed)
        self.seed_generator = keras.random.SeedGenerator(seed)
        share_num_groups(primary_gating, num_groups)
        configs.hold(self, primary_gating)

    @property
    def has_noise(self) -> bool:
        """Whether choices in training depend on noise, on either level."""
        own = not self._noise.is_none
        return own or getattr(self.primary_gating, "has_noise", False)

    @property
    def has_smooth_load(self) -> bool:  # type: ignore[override]
        """Whether the load in training has a gradient, to either level."""
        size = (self.num_experts or 2**31) // self.num_groups
        if not self._noise.is_none and self.k[1] < size:
            return True
        return getattr(self.primary_gating, "has_smooth_load", True)

    def choices(self):
        group_size = self.num_experts // self.num_groups
        primary = [
            choice._replace(
                of="num_groups",
                gate="the primary gate",
                remedy='normalization="all" for it',
            )
            for choice in getattr(self.primary_gating, "choices", list)()
        ]
        own = Choice(
            self.k[1],
            group_size,
            self.secondary_normalization,
            of="group size",
            gate="the secondary gates",
            remedy='normalization="all" for them',
        )
        return [*primary, own]

    # Set by a `HierarchicalMoE` whose experts are layers: a group then runs on one
    # device of all, in expert-parallel groups of devices too.
    groups_are_shared_by_all = False

    def _verify_against_num_experts(self):
        verify_groups(self.num_experts, self.num_groups, self.k)

    def _add_kernel(self, name, features, initializer):
        return engine.for_weights().weights.add_group_weight(
            self,
            (self.num_groups, features, self.num_experts // self.num_groups),
            PerExpertInitializer(initializer),
            name,
        )

    def _add_bias(self):
        return engine.for_weights().weights.add_group_weight(
            self,
            (self.num_groups, self.num_experts // self.num_groups),
            "zeros",
            "gate_bias",
        )

    def build(self, input_shape):
        super().build(input_shape)
        if self._noise.is_learned:
            self.noise_kernel = self._add_kernel(
                "noise_kernel", input_shape[-1], self.noise_initializer
            )
        if not self.primary_gating.built:
            self.primary_gating.build(input_shape)
        # Its own kernel may be spread over devices.
        self._noise.build(self, getattr(self.primary_gating, "gate_kernel", None))

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        if engine.current().static_shapes:
            return hierarchical_gating(self, inputs, mask, training)
        primary = self.primary_gating(inputs, mask=mask, training=training)
        verify_gating_result(primary, self.primary_gating, "primary_gating")
        plan = functional.make_plan(primary)
        rows = plan.dispatch(inputs)  # (M, D), sorted by group
        row_mask = None if mask is None else tf.gather(mask, plan.token_indices)
        groups = tf.repeat(tf.range(self.num_groups), plan.counts)
        secondary = self.secondary(rows, groups, plan.counts, training, row_mask)
        # From rows sorted by group to pairs in the order of the tokens.
        pairs = tf.reshape(plan.positions, [-1])
        gates, expert_indices = functional.hierarchical_gates(
            tf.reshape(primary.gates, [-1]),
            tf.gather(groups, pairs),
            tf.gather(secondary.gates, pairs),
            tf.gather(secondary.indices, pairs),
            self.num_experts // self.num_groups,
        )
        load = secondary.load
        if load is not None:
            load = functional.hierarchical_load(
                primary.statistics.load, load, primary.statistics.counts
            )
        tokens, shape = None, [-1]
        if primary.is_ragged:
            tokens = tf.repeat(primary.token_indices, self.k[1])
        else:
            shape.append(primary.gates.shape[1] * self.k[1])
        result = functional.make_gating_result(
            tf.reshape(gates, shape),
            tf.reshape(expert_indices, shape),
            self.num_experts,
            token_indices=tokens,
            load=load,
            mask=mask,
        )
        return with_levels(result, primary, secondary)

    def secondary(
        self,
        rows: tf.Tensor,
        groups: tf.Tensor,
        counts: tf.Tensor,
        training: bool | None,
        row_mask: tf.Tensor | None = None,
        first_row: tf.Tensor | int | None = None,
    ) -> SecondaryGates:
        """The secondary gates of rows that are sorted by group.

        On several devices it sees the groups that live on this one.

        Args:
            rows: `(M, D)` in the gate's compute type.
            groups: `(M,)` int32, ascending: the group of every row, counted from
                the first that lives here.
            counts: `(groups here,)` int32, rows of each group.
            training: Whether the gates add their noise.
            row_mask: `(M,)` bool or None. False leaves a row out of the load.
                Defaults to `None`.
            first_row: `()` int32, how many rows of all devices come before these,
                or `(groups here,)`, before those of each group, where other devices
                have rows of it too. Defaults to `None`, on one device.

        Returns:
            The `SecondaryGates`.
        """
        with_raw_noise = training and self._noise.is_learned
        kernels = [tf.convert_to_tensor(self.gate_kernel)]
        if with_raw_noise:
            kernels.append(tf.convert_to_tensor(self.noise_kernel))
        kernel = tf.concat(kernels, axis=-1)
        biases = None
        if self.use_bias:  # of the clean logits
            bias = tf.convert_to_tensor(self.gate_bias)
            own = [bias, tf.zeros_like(bias)] if with_raw_noise else [bias]
            biases = [tf.concat(own, axis=-1)]
        logits = functional.feed_forward_experts(rows, [kernel], biases, counts)
        clean, raw_noise = tf.split(logits, 2, -1) if with_raw_noise else (logits, None)

        def draw():
            return draw_rows(
                tf.shape(clean)[0],
                clean.shape[-1],
                self.compute_dtype,
                self.seed_generator,
                first_row,
                row_mask,
                counts=counts,
            )

        found, probs = choose(self, clean, raw_noise, draw, row_mask, training)
        if probs is None:
            return found
        if row_mask is not None:
            groups = tf.where(row_mask, groups, -1)
        load = tf.math.unsorted_segment_sum(probs, groups, kernel.shape[0])
        return found._replace(load=load)

    def get_config(self):
        return {
            **super().get_config(),
            "num_groups": self.num_groups,
            "k": list(self.k),
            "primary_gating": configs.serialize(self, self.primary_gating),
            "normalization": self.normalization
            if isinstance(self.normalization, str)
            else list(self.normalization),
            "noise_stddev": self._noise.get_config(),
            "noise_epsilon": self.noise_epsilon,
            "noise_initializer": keras.initializers.serialize(self.noise_initializer),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        return cls(**with_primary_gating(config))


def with_primary_gating(config):
    primary = configs.deserialize(config.get("primary_gating"), config["num_groups"])
    return {**config, "primary_gating": primary}
