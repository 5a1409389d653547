"""A gate of two levels: over groups, and within each group."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks, functional, placement
from keras_moe.functional.dispatch import verify_gating_result
from keras_moe.layers.gating import NoisyTopKGating, _Gating
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
        noise_epsilon: Float. Least standard deviation of the secondary noise.
            Defaults to `1e-2`.
        gate_initializer: Initial value of the secondary `gate_kernel`. Defaults
            to `"zeros"`.
        noise_initializer: Initial value of the secondary `noise_kernel`.
            Defaults to `"zeros"`.
        seed: Int or None. Seed of the secondary noise. Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Bool. True adds the noise, on both levels.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, k1 * k2)` float32, the dispatch plan,
        the statistics over all experts.

    Losses and state:
        Weights of the primary gate; `gate_kernel` and `noise_kernel`, each
        `(num_groups, features, group size)`. No losses. The load is that of
        equation 14 in training, a hard count otherwise.

    Raises:
        ValueError: `num_experts` is not a multiple of `num_groups`; `k` is not
            two ints within the number of groups and their size; the primary
            gate has another number of experts than `num_groups`.

    Example:

    >>> gating = keras_moe.layers.HierarchicalGating(4, k=(2, 1), num_experts=12)
    >>> gates, plan, *_ = gating(np.ones((3, 8), "float32"))
    >>> gates.shape.as_list()
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
        noise_epsilon: float = 1e-2,
        gate_initializer: Any = "zeros",
        noise_initializer: Any = "zeros",
        seed: int | None = None,
        **kwargs: Any,
    ):
        num_groups = checks.verify_positive_int(num_groups, "num_groups")
        noise_epsilon = checks.verify_weight(noise_epsilon, "noise_epsilon")
        k = verify_two_ks(k)
        super().__init__(num_experts, gate_initializer=gate_initializer, **kwargs)
        if primary_gating is None:
            primary_gating = NoisyTopKGating(k[0], dtype=self.dtype_policy)
        self.num_groups = num_groups
        self.k = k
        self.primary_gating = primary_gating
        self.noise_epsilon = noise_epsilon
        self.noise_initializer = keras.initializers.get(noise_initializer)
        self.seed = seed = checks.verify_seed(seed)
        self.seed_generator = keras.random.SeedGenerator(seed)
        # The secondary gates see as many rows as the primary gate sends them.
        self.supports_jit = False
        _share_num_groups(primary_gating, num_groups)

    def _verify_against_num_experts(self):
        verify_groups(self.num_experts, self.num_groups, self.k)

    def _add_kernel(self, name, features, initializer):
        return placement.for_weights().add_group_weight(
            self,
            (self.num_groups, features, self.num_experts // self.num_groups),
            PerExpertInitializer(initializer),
            name,
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
        if placement.for_call().static_shapes:
            return hierarchical_gating(self, inputs, mask, training)
        primary = verify_gating_result(
            self.primary_gating(inputs, mask=mask, training=training)
        )
        plan = primary.plan
        rows = functional.dispatch(inputs, plan)  # (M, D), sorted by group
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
        tokens = None
        if plan.positions.shape.rank == 1:
            tokens = tf.repeat(tf.gather(plan.token_indices, pairs), self.k[1])
            shape = tf.constant([-1])
        else:
            shape = tf.constant([-1, plan.positions.shape[1] * self.k[1]])
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
        logits = functional.feed_forward_experts(rows, [kernel], None, counts)
        k = self.k[1]
        if not training:
            gates, indices = functional.top_k_gating(logits, k)
            return gates, indices, None
        clean, raw_noise = tf.split(logits, 2, axis=-1)
        stddev = functional.noise_stddev(raw_noise, self.noise_epsilon)
        noise = draw_rows(
            tf.shape(clean)[0],
            clean.shape[-1],
            self.compute_dtype,
            self.seed_generator,
            first_row,
        )
        noisy = functional.noisy_logits(clean, stddev, noise)
        largest = None
        if k < clean.shape[-1]:
            largest = functional.largest_logits(noisy, k)
            probs = functional.prob_in_top_k(clean, noisy, stddev, k, largest)
        else:  # every expert of a chosen group takes the token
            probs = tf.ones_like(clean)
        gates, indices = functional.top_k_gating(noisy, k, largest=largest)
        if row_mask is not None:
            groups = tf.where(row_mask, groups, -1)
        load = tf.math.unsorted_segment_sum(probs, groups, num_groups)
        return gates, indices, load

    def get_config(self):
        return {
            **super().get_config(),
            "num_groups": self.num_groups,
            "k": list(self.k),
            "primary_gating": keras.saving.serialize_keras_object(self.primary_gating),
            "noise_epsilon": self.noise_epsilon,
            "noise_initializer": keras.initializers.serialize(self.noise_initializer),
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**with_primary_gating(config))


def with_primary_gating(config):
    primary = config.get("primary_gating")
    if isinstance(primary, dict):
        primary = keras.saving.deserialize_keras_object(primary)
    return {**config, "primary_gating": primary}


def verify_two_ks(k):
    if np.shape(k) != (2,):
        raise ValueError(
            "`k` must be two ints: groups for each token, and experts in each "
            f"group. Received: k={k!r}."
        )
    return (checks.verify_k(k[0]), checks.verify_k(k[1]))


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
    if not isinstance(primary_gating, keras.layers.Layer):
        raise ValueError(
            "`primary_gating` must be a layer that returns a "
            f"keras_moe.types.GatingResult. Received: {primary_gating!r}."
        )
    stated = getattr(primary_gating, "num_experts", None)
    if stated is None:
        primary_gating.num_experts = num_groups
    elif stated != num_groups:
        raise ValueError(
            "`primary_gating` must gate as many experts as there are groups. "
            f"Received: primary_gating.num_experts={stated}, num_groups={num_groups}."
        )
