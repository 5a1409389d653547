"""The Mixture-of-Experts layer: gate, dispatch, experts, combine, losses."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, functional, placement
from keras_moe.functional.dispatch import verify_gating_result
from keras_moe.layers.balance_metric import BalanceMetric, add_balance
from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.gating import NoisyTopKGating, TopKGating
from keras_moe.layers.routing import RoutingRecord
from keras_moe.types import GatingResult


@keras.saving.register_keras_serializable(package="keras_moe")
class MoE(keras.layers.Layer):
    """The Sparsely-Gated Mixture-of-Experts layer.

    $y = \\sum_i G(x)_i E_i(x)$ (equation 1), where the gate $G(x)$ is zero for
    all but k experts, and an expert runs only on the tokens that chose it. So
    the number of parameters grows with the number of experts while the cost of
    a token does not.

    All leading dimensions of the inputs are flattened: every time step of every
    sequence is a token, and all of them make one batch (section 3.1). Nothing is
    dropped: without `capacity_factor` a token's output does not depend on the
    other tokens of the batch.

    Args:
        experts: `FeedForwardExperts`, or another layer with a `num_experts`
            attribute that maps rows sorted by expert, and their `counts`, to
            rows.
        gating: The gate, for example `NoisyTopKGating(k=4)`: a layer that maps
            `(tokens, features)` to a `GatingResult`. None means
            `NoisyTopKGating(k=4)`. Defaults to `None`.
        importance_loss_weight: Float. Weight of the squared coefficient of
            variation of the experts' importance (equation 7). Defaults to
            `0.1`, the paper's for language models.
        load_loss_weight: Float. Weight of the same of their load (equation
            11). Defaults to `0.1`.
        activation: Activation of the combined output. The paper's language
            models use `"sigmoid"`. Defaults to `None`.
        capacity_factor: Float or None. A number gives every expert
            `ceil(capacity_factor * k * tokens / num_experts)` slots, so that all
            shapes are static and XLA can compile the layer; tokens that do
            not fit get zero from that expert, and the share of dropped
            assignments is reported as `overflow`. None drops nothing.
            Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(..., features)`.
        mask: Bool tensor of the leading dimensions, or None. Tokens marked
            False (padding) are neither routed nor counted; their output is zero
            before `activation`.
        training: Bool. Whether the gate adds its noise.

    Input shape:
        `(..., features)`, rank 2 or more. Leading dimensions may be unknown,
        and zero tokens are allowed.

    Output shape:
        `(..., output_units)` of the experts, by default the input shape.

    Losses and state:
        Adds the two losses with `add_loss` (in evaluation too, there from true
        counts). The balance of the experts appears in the logs of `fit` and
        `evaluate`, under `<name>_importance_cv`, `<name>_load_cv` and
        `<name>_max_over_mean_load`, summed over the epoch. Weights are those
        of the gate and the experts.

    Raises:
        ValueError: Inputs are not floating point, of rank below 2 or without a
            known feature dimension; a weight is negative; the gate and the
            experts disagree on `num_experts`; `k` exceeds it.

    XLA: Without `capacity_factor` shapes depend on the data, so the layer tells
    Keras not to compile it with XLA. With it, `jit_compile=True` works.

    Mixed precision: gate maths runs in float32, experts in the compute type.

    Example:

    >>> layer = keras_moe.layers.MoE(
    ...     experts=keras_moe.layers.FeedForwardExperts(16, hidden_units=32),
    ...     gating=keras_moe.layers.NoisyTopKGating(k=2),
    ... )
    >>> layer(np.ones((2, 5, 8), "float32"), training=True).shape.as_list()
    [2, 5, 8]
    >>> len(layer.losses)
    2

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks: The
        Sparsely-Gated Mixture-of-Experts Layer", arXiv 1701.06538.
    """

    def __init__(
        self,
        experts: keras.layers.Layer,
        gating: keras.layers.Layer | None = None,
        *,
        importance_loss_weight: float = 0.1,
        load_loss_weight: float = 0.1,
        activation: Any = None,
        capacity_factor: float | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name or default_name("moe"), **kwargs)
        _verify_experts(experts)
        self.importance_loss_weight = checks.verify_weight(
            importance_loss_weight, "importance_loss_weight"
        )
        self.load_loss_weight = checks.verify_weight(
            load_loss_weight, "load_loss_weight"
        )
        if capacity_factor is not None:
            functional.expert_capacity(1, 1, 1, capacity_factor)  # raises if <= 0
            capacity_factor = float(capacity_factor)
        if gating is None:
            gating = NoisyTopKGating(dtype=self.dtype_policy)
        self.experts = experts
        self.gating = gating
        self.activation = keras.activations.get(activation)
        self.capacity_factor = capacity_factor
        # Set by `recorded_routing`: takes the `RoutingRecord` of every call.
        self.on_routing: Callable[[RoutingRecord], None] | None = None
        self.supports_masking = True
        # Dropless shapes depend on the data, which XLA cannot compile.
        self.supports_jit = capacity_factor is not None
        share_num_experts(gating, experts.num_experts)
        self._warn_of_missing_gradients()

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.experts.num_experts

    def _warn_of_missing_gradients(self):
        gating = self.gating
        if not isinstance(gating, TopKGating):
            return
        if gating.k == 1 < self.num_experts and gating.normalization == "selected":
            warnings.warn(
                f"{self.name}: with k=1 of num_experts={self.num_experts} and "
                'normalization="selected", every gate is constantly 1 and the task '
                'gives the gate no gradient. Use normalization="all" or k >= 2.',
                stacklevel=3,
            )
        if (
            isinstance(gating, NoisyTopKGating)
            and self.load_loss_weight
            and 1 < gating.k == self.num_experts
        ):
            warnings.warn(
                f"{self.name}: with k={gating.k} of num_experts={self.num_experts} "
                "every expert takes every token, so the load loss "
                f"(load_loss_weight={self.load_loss_weight}) is constantly 0. Set it "
                "to 0, lower `k` or add experts.",
                stacklevel=3,
            )

    def build(self, input_shape):
        features = checks.verify_input_shape(input_shape, type(self).__name__)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        place = placement.for_weights()
        several = place.num_replicas > 1 or place.static_shapes
        if self.capacity_factor is not None and several:
            raise ValueError(
                "`capacity_factor` must be None on several devices, where experts "
                "take all their tokens. Received: capacity_factor="
                f"{self.capacity_factor} on {place.num_replicas} replicas. Leave it "
                "out."
            )
        if not self.gating.built:
            self.gating.build((None, features))
        if not self.experts.built:
            self.experts.build((None, features))
        if self.num_experts > 1:  # a single expert has nothing to balance
            self.balance = BalanceMetric(
                self.num_experts, self.capacity_factor is not None, name=self.name
            )

    def call(self, inputs, mask=None, training=None):
        checks.verify_floating(inputs.dtype, type(self).__name__)
        tokens = tf.reshape(inputs, [-1, inputs.shape[-1]])
        mask = None if mask is None else _flatten_mask(mask, inputs)
        real = None
        keeps_padding = placement.for_call().static_shapes
        if mask is None or self.capacity_factor is not None or keeps_padding:
            outputs, result = self._mix(tokens, mask, training)
        else:
            # Padding leaves before the gate sees it, and zeros come back in
            # its place. Indices are unique: the scatter is deterministic.
            real = tf.where(mask)
            outputs, result = self._mix(tf.gather_nd(tokens, real), None, training)
            shape = tf.stack([tf.shape(tokens, tf.int64)[0], outputs.shape[-1]])
            outputs = tf.scatter_nd(real, outputs, shape)
        leading = tf.shape(inputs)[:-1]
        if self.on_routing is not None:
            seen = None if real is None else real[:, 0]
            self.on_routing(RoutingRecord(result, seen, leading))
        outputs = tf.reshape(outputs, tf.concat([leading, [outputs.shape[-1]]], axis=0))
        outputs.set_shape(self.compute_output_shape(inputs.shape))
        return self.activation(outputs)

    def _mix(self, tokens, mask, training):
        """Outputs `(N, output_units)` and the gate's result; losses on the way."""
        result = self._route(tokens, mask, training)
        gates, plan, statistics, auxiliary_losses = result
        place = placement.for_call()
        if place.static_shapes:
            outputs = place.mix(self, tokens, result, mask)
        elif place is placement.ONE_DEVICE and type(self.experts) is FeedForwardExperts:
            outputs = self.experts(tokens, gates=gates, plan=plan)
        else:
            rows = functional.dispatch(tokens, plan)
            rows = place.run_experts(self.experts, rows, plan.counts)
            num_tokens = tf.shape(tokens)[0]
            outputs = functional.combine(rows, gates, plan, num_tokens=num_tokens)
        entropy = partial(functional.gate_entropy, gates, tf.shape(tokens)[0], mask)
        add_balance(self, statistics, plan.overflow, entropy)
        for loss in auxiliary_losses:
            self.add_loss(loss)
        return outputs, result

    def _route(self, tokens, mask, training) -> GatingResult:
        result = self.gating(tokens, mask=mask, training=training)
        verify_gating_result(result)
        if self.capacity_factor is None:
            return result
        plan = result.plan
        if plan.positions.shape.rank != 2:
            raise ValueError(
                f"{self.name}: `capacity_factor` needs a gate that gives every token "
                f"the same number of experts. Received: capacity_factor="
                f"{self.capacity_factor} with {type(self.gating).__name__}. Leave "
                "`capacity_factor` out."
            )
        capacity = functional.expert_capacity(
            tf.shape(tokens)[0],
            self.num_experts,
            plan.positions.shape[-1],
            self.capacity_factor,
        )
        plan = functional.make_capacity_plan(
            plan.expert_indices, self.num_experts, capacity, mask
        )
        return result._replace(plan=plan)

    def route(self, inputs, training: bool = False) -> GatingResult:
        """Which experts take which tokens, without running them.

        Args:
            inputs: Float tensor `(..., features)`, not masked.
            training: Bool. Whether the gate adds its noise. Defaults to
                `False`.

        Returns:
            A `GatingResult` over the flattened tokens: `gates` and
            `plan.expert_indices` are `(tokens, k)`, or `(assignments,)` for a
            gate that gives tokens different numbers of experts.
        """
        inputs = tf.convert_to_tensor(inputs)
        if not self.built:
            self.build(inputs.shape)
        tokens = tf.reshape(inputs, [-1, inputs.shape[-1]])
        return verify_gating_result(self.gating(tokens, training=training))

    def compute_output_shape(self, input_shape):
        last = self.experts.compute_output_shape((None, input_shape[-1]))[-1]
        return (*input_shape[:-1], last)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "experts": serialize(self.experts),
            "gating": serialize(self.gating),
            "importance_loss_weight": self.importance_loss_weight,
            "load_loss_weight": self.load_loss_weight,
            "activation": keras.activations.serialize(self.activation),
            "capacity_factor": self.capacity_factor,
        }

    @classmethod
    def from_config(cls, config):
        deserialize = keras.saving.deserialize_keras_object
        config = dict(config)
        config["experts"] = deserialize(config["experts"])
        config["gating"] = deserialize(config["gating"])
        return cls(**config)


def default_name(prefix):
    """`moe`, `moe_1`, ...: Keras would make `mo_e` of the class name."""
    uid = keras.backend.get_uid(prefix)
    return prefix if uid == 1 else f"{prefix}_{uid - 1}"


def _verify_experts(experts):
    if not isinstance(experts, keras.layers.Layer) or not hasattr(
        experts, "num_experts"
    ):
        raise ValueError(
            "`experts` must be a layer with a `num_experts` attribute, such as "
            f"keras_moe.layers.FeedForwardExperts. Received: experts={experts!r}."
        )


def share_num_experts(gating, num_experts):
    """Tells the gate how many experts there are, if it does not say itself."""
    if not isinstance(gating, keras.layers.Layer):
        raise ValueError(
            "`gating` must be a layer that returns a keras_moe.types.GatingResult, "
            "such as keras_moe.layers.NoisyTopKGating. "
            f"Received: gating={gating!r}."
        )
    stated = getattr(gating, "num_experts", None)
    if stated is None:
        gating.num_experts = num_experts
    elif stated != num_experts:
        raise ValueError(
            "`gating` and `experts` must agree on `num_experts`. Received: "
            f"gating.num_experts={stated}, experts.num_experts={num_experts}. Leave it "
            "out of the gate, or make them equal; a gate cannot be shared by layers "
            "with different numbers of experts."
        )
    if isinstance(getattr(gating, "k", None), int):
        checks.verify_k(gating.k, num_experts)


def _flatten_mask(mask, inputs):
    """`(...)` or a prefix of it -> `(N,)` bool, for inputs `(..., features)`."""
    mask = tf.cast(mask, tf.bool)
    missing = inputs.shape.rank - 1 - mask.shape.rank
    if missing < 0 or not mask.shape.is_compatible_with(
        inputs.shape[: mask.shape.rank]
    ):
        raise ValueError(
            "`mask` must have the leading dimensions of `inputs`. Received: "
            f"mask.shape={mask.shape}, inputs.shape={inputs.shape}."
        )
    for _ in range(missing):
        mask = mask[..., tf.newaxis]
    return tf.reshape(tf.broadcast_to(mask, tf.shape(inputs)[:-1]), [-1])
