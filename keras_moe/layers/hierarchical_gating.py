"""A gate of two levels: over groups, and within each group."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.functional.gating import NORMALIZATIONS
from keras_moe.layers import configs
from keras_moe.layers.base_gating import Choice, _Gating
from keras_moe.layers.gate_contract import verify_gating, verify_gating_result
from keras_moe.layers.gating import NoisyTopKGating
from keras_moe.layers.hierarchical_static import hierarchical_gating
from keras_moe.layers.initializers import PerExpertInitializer
from keras_moe.layers.noise import draw_rows
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
        noise_epsilon: Float. Least standard deviation of the secondary noise.
            Defaults to `1e-2`.
        gate_initializer: Initial value of the secondary `gate_kernel`. Defaults
            to `"zeros"`.
        noise_initializer: Initial value of the secondary `noise_kernel`.
            Defaults to `"zeros"`.
        use_bias: Bool. Whether the clean logits of the secondary gates, and of a
            primary gate that is left out, have a bias. Defaults to `False`.
        seed: Int or None. Seed of the secondary noise. Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Bool. True adds the noise, on both levels.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, k1 * k2)` float32, the chosen experts,
        the statistics over all experts.

    Losses and state:
        Weights of the primary gate; `gate_kernel` and `noise_kernel`, each
        `(num_groups, features, group size)`, and with `use_bias` `gate_bias`
        `(num_groups, group size)`. No losses. The load is that of
        equation 14 in training, a hard count otherwise.

    Raises:
        ValueError: `num_experts` is not a multiple of `num_groups`; `k` is not
            two ints within the number of groups and their size; the primary
            gate has another number of experts than `num_groups`.

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
        noise_epsilon: float = 1e-2,
        gate_initializer: Any = "zeros",
        noise_initializer: Any = "zeros",
        use_bias: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ):
        num_groups = checks.verify_positive_int(num_groups, "num_groups")
        noise_epsilon = checks.verify_weight(noise_epsilon, "noise_epsilon")
        k = verify_two_ks(k)
        of_primary, of_secondary = two_normalizations(normalization)
        super().__init__(
            num_experts, gate_initializer=gate_initializer, use_bias=use_bias, **kwargs
        )
        if primary_gating is None:
            primary_gating = NoisyTopKGating(
                k[0],
                normalization=of_primary,
                use_bias=use_bias,
                dtype=self.dtype_policy,
            )
        self.num_groups = num_groups
        self.k = k
        self.normalization = normalization
        self.secondary_normalization = of_secondary
        self.primary_gating = primary_gating
        self.noise_epsilon = noise_epsilon
        self.noise_initializer = keras.initializers.get(noise_initializer)
        self.seed = seed = checks.verify_seed(seed)
        self.seed_generator = keras.random.SeedGenerator(seed)
        _share_num_groups(primary_gating, num_groups)
        configs.hold(self, primary_gating)

    @property
    def has_smooth_load(self) -> bool:  # type: ignore[override]
        """Whether the load in training has a gradient, to either level."""
        if self.num_experts is None or self.k[1] < self.num_experts // self.num_groups:
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
        self.noise_kernel = self._add_kernel(
            "noise_kernel", input_shape[-1], self.noise_initializer
        )
        if not self.primary_gating.built:
            self.primary_gating.build(input_shape)

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
        gates, indices, load = self.secondary(
            rows, groups, plan.counts, training, row_mask
        )
        # From rows sorted by group to pairs in the order of the tokens.
        pairs = tf.reshape(plan.positions, [-1])
        gates, expert_indices = functional.hierarchical_gates(
            tf.reshape(primary.gates, [-1]),
            tf.gather(groups, pairs),
            tf.gather(gates, pairs),
            tf.gather(indices, pairs),
            self.num_experts // self.num_groups,
        )
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
        return result._replace(auxiliary_losses=primary.auxiliary_losses)

    def secondary(
        self,
        rows: tf.Tensor,
        groups: tf.Tensor,
        counts: tf.Tensor,
        training: bool | None,
        row_mask: tf.Tensor | None = None,
        first_row: tf.Tensor | int | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
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
            first_row: `()` int32, how many rows of all devices come before these.
                Defaults to `None`, on one device.

        Returns:
            gates: `(M, k2)` float within the group.
            indices: `(M, k2)` int32 within the group.
            load: `(groups here, group size)` smooth load in training, else None.
        """
        kernels = [tf.convert_to_tensor(self.gate_kernel)]
        if training:
            kernels.append(tf.convert_to_tensor(self.noise_kernel))
        kernel = tf.concat(kernels, axis=-1)
        num_groups = kernel.shape[0]
        biases = None
        if self.use_bias:  # of the clean logits
            bias = tf.convert_to_tensor(self.gate_bias)
            biases = [tf.concat([bias, tf.zeros_like(bias)], -1) if training else bias]
        logits = functional.feed_forward_experts(rows, [kernel], biases, counts)
        k, normalization = self.k[1], self.secondary_normalization
        if not training:
            gates, indices = functional.top_k_gating(logits, k, normalization)
            return gates, indices, None
        clean, raw_noise = tf.split(logits, 2, axis=-1)
        noise = draw_rows(
            tf.shape(clean)[0],
            clean.shape[-1],
            self.compute_dtype,
            self.seed_generator,
            first_row,
            row_mask,
        )
        # Every expert of a chosen group takes the token if k is their number.
        gates, indices, probs = functional.noisy_top_k_gating(
            clean, raw_noise, noise, k, normalization, self.noise_epsilon
        )
        if row_mask is not None:
            groups = tf.where(row_mask, groups, -1)
        load = tf.math.unsorted_segment_sum(probs, groups, num_groups)
        return gates, indices, load

    def get_config(self):
        return {
            **super().get_config(),
            "num_groups": self.num_groups,
            "k": list(self.k),
            "primary_gating": configs.serialize(self, self.primary_gating),
            "normalization": self.normalization
            if isinstance(self.normalization, str)
            else list(self.normalization),
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


def verify_two_ks(k):
    if np.shape(k) != (2,):
        raise ValueError(
            "`k` must be two ints: groups for each token, and experts in each "
            f"group. Received: k={k!r}."
        )
    return (checks.verify_k(k[0]), checks.verify_k(k[1]))


def two_normalizations(normalization):
    """That of the primary gate and that of the secondary gates."""
    if isinstance(normalization, str):
        normalization = (normalization, normalization)
    if not isinstance(normalization, Sequence) or len(normalization) != 2:
        raise ValueError(
            '`normalization` must be "selected" or "all", or two of these, for the '
            "primary gate and for the secondary gates. Received: "
            f"normalization={normalization!r}."
        )
    for each in normalization:
        checks.verify_choice(each, "normalization", NORMALIZATIONS)
    return tuple(normalization)


def verify_groups(num_experts, num_groups, k):
    if num_experts % num_groups:
        raise ValueError(
            "`num_experts` must be a multiple of `num_groups`. Received: "
            f"num_experts={num_experts}, num_groups={num_groups}. Every group has "
            "the same number of experts."
        )
    group_size = num_experts // num_groups
    if k[0] > num_groups or k[1] > group_size:
        raise ValueError(
            "`k` must be at most the number of groups and their size. Received: "
            f"k={tuple(k)}, num_groups={num_groups}, {group_size} experts a group. "
            "Lower `k` or add experts."
        )


def _share_num_groups(primary_gating, num_groups):
    verify_gating(primary_gating, "primary_gating")
    stated = getattr(primary_gating, "num_experts", None)
    if stated is None:
        primary_gating.num_experts = num_groups
    elif stated != num_groups:
        raise ValueError(
            "`primary_gating` must gate as many experts as there are groups. "
            f"Received: primary_gating.num_experts={stated}, num_groups={num_groups}."
        )
