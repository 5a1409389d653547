"""The Mixture-of-Experts layer: gate (router), dispatch, experts, combine, losses."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.functional.capacity import verify_fixed_k
from keras_moe.functional.dispatching import without_padding
from keras_moe.layers import configs
from keras_moe.layers.balance_losses import add_balance
from keras_moe.layers.balance_metric import BalanceMetric
from keras_moe.layers.gate_contract import (
    default_gating,
    loss_weights_config,
    set_loss_weights,
    share_num_experts,
    verify_gating_result,
    warn_of_constant_gates,
    warn_of_flat_load,
)
from keras_moe.layers.gating import k_of
from keras_moe.layers.moe_inputs import flatten_mask, verify_gate_inputs
from keras_moe.layers.routing_record import RoutingRecord
from keras_moe.layers.shared_experts import add_shared, build_shared, verify_shared
from keras_moe.layers.step_clock import nothing_noted
from keras_moe.types import GatingResult


@keras.saving.register_keras_serializable(package="keras_moe")
class MoE(keras.layers.Layer):
    """The Sparsely-Gated Mixture-of-Experts layer.

    $y = \\sum_i G(x)_i E_i(x)$ (equation 1), where the gate $G(x)$ is zero for
    all but k experts, and an expert runs only on the tokens that chose it. So
    the number of parameters grows with the number of experts while the cost of
    a token does not.

    All leading dimensions of the inputs are flattened: every time step of every
    sequence is a token, and all of them make one batch (section 3.1): no
    `keras.layers.TimeDistributed` around it. Nothing is
    dropped: without `capacity_factor` a token's output does not depend on the
    other tokens of the batch.

    Args:
        experts: `FeedForwardExperts`, or another layer with a `num_experts`
            attribute that maps rows sorted by expert, and their `counts`, to
            rows.
        gating: The gate, for example `NoisyTopKGating(k=4)`: a layer that maps
            `(tokens, features)` to a `GatingResult`. None means
            `NoisyTopKGating(k=4)`; of 3 or 4 experts one is left out, and of 2
            one is picked, with `normalization="all"`. Defaults to `None`.
        importance_loss_weight: Float or None. Weight of the squared coefficient of
            variation of the experts' importance (equation 7). None means 0.1, the
            paper's for language models, and 0 with a gate that balances without a
            loss. Defaults to `None`.
        load_loss_weight: Float or None. Weight of the same of their load (equation
            11). None means 0.1 where the load is smooth (`NoisyTopKGating` with
            `k < num_experts`), else 0: counts have no gradient. Defaults to `None`.
        activation: Activation of the combined output. The paper's language
            models use `"sigmoid"`. Defaults to `None`.
        capacity_factor: Float or None. A number gives every expert
            `ceil(capacity_factor * k * tokens / num_experts)` slots in training, so
            that all shapes are static and XLA can compile the layer; tokens that do
            not fit get zero from that expert, and the share of dropped
            assignments is reported as `overflow`. Padding counts as no token. On several
            devices tokens are those of all, and what is dropped is what one device
            would drop. None drops nothing. Defaults to `None`.
        evaluation_capacity_factor: Float or None. That of evaluation and serving,
            where a gate without noise is less balanced. None drops nothing there.
            Defaults to `None`.
        losses_in_evaluation: Bool. Whether the losses are added in evaluation too,
            there from true counts. Defaults to `False`.
        shared_experts: A layer that maps `(tokens, features)` to `(tokens,
            output_units)`, such as a `keras.Sequential` of `Dense`, or None. Every
            token passes it, and its answer is added to the mixture's before
            `activation`: $y = S(x) + \\sum_i G(x)_i E_i(x)$. Several shared experts
            are one that is as many times as wide. On several devices each has a
            copy. Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(..., features)`.
        mask: Bool tensor of the leading dimensions, or None. Tokens marked
            False (padding) are neither routed nor counted; their output is zero
            before `activation`.
        training: Bool. Whether the gate adds its noise and the layer its losses.
            None, outside of `fit`, is False.
        gate_inputs: Float tensor `(..., gate_features)` with the leading dimensions
            of `inputs`, or None. What the gate sees in place of `inputs`, for which
            the experts then need not be chosen by what they are given: a user, a
            language, the task.

    Input shape:
        `(..., features)`, rank 2 or more. Leading dimensions may be unknown,
        and zero tokens are allowed.

    Output shape:
        `(..., output_units)` of the experts, by default the input shape.

    Losses and state:
        Adds the two losses, and those of the gate's own, with `add_loss`: in
        training, so that the loss of an evaluation is that of the task.
        `trainable=False` changes nothing of it: what comes before the layer still
        learns from them. The balance of the experts appears in the logs of `fit` and
        `evaluate`, under `<name>_importance_cv`, `<name>_load_cv` and
        `<name>_max_over_mean_load`, summed over the epoch. Weights are those
        of the gate, the experts and the shared experts.

    Raises:
        ValueError: Inputs are not floating point, of rank below 2 or without a
            known feature dimension; `gate_inputs` have other leading dimensions, or
            come where the gate was built without; a weight is negative; the gate and the
            experts disagree on `num_experts`; `k` exceeds it.

    XLA and GPUs: shapes do not depend on the data there, and nothing is dropped
    either: experts run in static slots (`functional.SlotPlan`), and an uneven batch
    takes longer. `jit_compile=True` works on any one device; by `"auto"` Keras compiles
    where there is a GPU. Experts that are not `Experts`, an `ExpertList` say, then get a
    slot for every token.

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
        Sparsely-Gated Mixture-of-Experts Layer", arXiv 1701.06538. Shared experts:
        Dai et al. 2024, "DeepSeekMoE", arXiv 2401.06066, equations 9 to 11. A gate
        with inputs of its own: Jacobs et al. 1991, "Adaptive mixtures of local
        experts".
    """

    def __init__(
        self,
        experts: keras.layers.Layer,
        gating: keras.layers.Layer | None = None,
        *,
        importance_loss_weight: float | None = None,
        load_loss_weight: float | None = None,
        activation: Any = None,
        capacity_factor: float | None = None,
        evaluation_capacity_factor: float | None = None,
        losses_in_evaluation: bool = False,
        shared_experts: keras.layers.Layer | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name or default_name("moe"), **kwargs)
        _verify_experts(experts)
        verify_shared(shared_experts)
        if capacity_factor is not None:
            capacity_factor = checks.verify_capacity_factor(capacity_factor)
        if evaluation_capacity_factor is not None:
            evaluation_capacity_factor = checks.verify_capacity_factor(
                evaluation_capacity_factor, "evaluation_capacity_factor"
            )
        if gating is None:
            gating = default_gating(experts.num_experts, self.dtype_policy)
        self.experts = experts
        self.gating = gating
        self.activation = keras.activations.get(activation)
        self.capacity_factor = capacity_factor
        self.evaluation_capacity_factor = evaluation_capacity_factor
        self.losses_in_evaluation = bool(losses_in_evaluation)
        self.shared_experts = shared_experts
        # Set by `recorded_routing`: takes the `RoutingRecord` of every call.
        self.on_routing: Callable[[RoutingRecord], None] | None = None
        self.supports_masking = True
        # Replicas exchange tokens by collectives of sizes that depend on the data.
        self.supports_jit = not engine.for_weights().several_devices
        share_num_experts(gating, experts.num_experts)
        configs.hold(self, experts, gating, shared_experts)
        set_loss_weights(self, importance_loss_weight, load_loss_weight)
        warn_of_constant_gates(self)
        warn_of_flat_load(self)

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.experts.num_experts

    # Of these names Keras takes the shapes of the call's tensors.
    def build(self, inputs_shape, gate_inputs_shape=None):
        features = checks.verify_input_shape(inputs_shape, type(self).__name__)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        self.gate_features = features
        if gate_inputs_shape is not None:
            self.gate_features = checks.verify_input_shape(
                gate_inputs_shape, f"the gate of {type(self).__name__}"
            )
        if not self.gating.built:
            self.gating.build((None, self.gate_features))
        if not self.experts.built:
            self.experts.build((None, features))
        engine.for_weights().weights.note_experts(self.experts.weights)
        units = self.compute_output_shape((None, features))[-1]
        build_shared(self.shared_experts, features, units)
        if self.num_experts > 1:  # a single expert has nothing to balance
            self.balance = BalanceMetric(
                self.num_experts, self._has_capacity, name=self.name
            )

    def call(self, inputs, mask=None, training=None, gate_inputs=None):
        checks.verify_dense(inputs, type(self).__name__)
        checks.verify_floating(inputs.dtype, type(self).__name__)
        verify_gate_inputs(self, gate_inputs, inputs)
        checks.warn_of_time_steps(self, keras.layers.TimeDistributed)
        dispatcher = self._dispatcher(training)
        if not dispatcher.static_shapes:
            engine.verify_not_compiled(type(self).__name__, " on several devices")
        # Those of the experts, and those of the gate where they are others.
        tokens = [inputs] if gate_inputs is None else [inputs, gate_inputs]
        tokens = [tf.reshape(x, [-1, x.shape[-1]]) for x in tokens]
        mask = None if mask is None else flatten_mask(mask, inputs)
        num_tokens, real = tf.shape(tokens[0], tf.int64)[0], None
        if mask is not None and dispatcher.static_shapes:
            # What padding holds, NaN too, is in no sum, nor in a gradient.
            is_real = mask[:, tf.newaxis]
            tokens = [tf.where(is_real, x, tf.zeros_like(x)) for x in tokens]
        elif mask is not None:
            # Padding leaves before the gate sees it, and zeros come back in its place.
            real, mask = tf.where(mask), None
            tokens = [tf.gather_nd(x, real) for x in tokens]
        tokens, gate_tokens = tokens[0], tokens[-1]
        outputs, result = self._mix(dispatcher, tokens, gate_tokens, mask, training)
        outputs = add_shared(
            self.shared_experts,
            outputs,
            tokens,
            mask,
            training,
            dispatcher.static_shapes,
        )
        if mask is not None:
            result = without_padding(result, mask)
        if real is not None:
            # Indices are unique: the scatter is deterministic.
            shape = tf.stack([num_tokens, outputs.shape[-1]])
            outputs = tf.scatter_nd(real, outputs, shape)
        leading = tf.shape(inputs)[:-1]
        if self.on_routing is not None:
            seen = None if real is None else real[:, 0]
            self.on_routing(RoutingRecord(result, seen, leading))
        outputs = tf.reshape(outputs, tf.concat([leading, [outputs.shape[-1]]], axis=0))
        outputs.set_shape(self.compute_output_shape(inputs.shape))
        return self.activation(outputs)

    def _dispatcher(self, training) -> functional.Dispatcher:
        """What moves tokens to experts where this call runs."""
        here = engine.current()
        factor = self.capacity_factor if training else self.evaluation_capacity_factor
        if here.dispatcher is not None:
            return here.dispatcher(k_of(self.gating), factor, self._most_experts)
        if factor is not None:
            return functional.CapacityDispatcher(factor, self._most_experts)
        if here.static_shapes:
            return functional.StaticDispatcher(k_of(self.gating))
        return functional.Dispatcher()

    def _mix(self, dispatcher, tokens, gate_tokens, mask, training):
        """Outputs `(N, output_units)` and the gate's result; losses on the way."""
        result = self.gating(gate_tokens, mask=mask, training=training)
        verify_gating_result(result, self.gating)
        if self._has_capacity and self._most_experts is None:
            gate = type(self.gating).__name__
            verify_fixed_k(result, k_of(self.gating), f"{self._capacities} with {gate}")
        rows = tokens
        if hasattr(self.experts, "with_keys"):
            rows = self.experts.with_keys(tokens, mask, training)
        outputs, overflow = dispatcher.mix(self.experts, rows, result, mask)

        def entropy():
            gates = result.gates / getattr(self.gating, "scaling_factor", 1.0)
            return functional.gate_entropy(gates, tf.shape(tokens)[0], mask)

        own = result.auxiliary_losses, overflow, entropy, result.choices_kept
        add_balance(self, result.statistics, training, *own)
        return outputs, result

    @property
    def _most_experts(self):
        """The most experts of a token, if the gate says that their number varies."""
        return getattr(self.gating, "most_experts", None)

    @property
    def _has_capacity(self):
        return (self.capacity_factor, self.evaluation_capacity_factor) != (None, None)

    @property
    def _capacities(self):
        """The factors that are given, for messages."""
        names = ("capacity_factor", "evaluation_capacity_factor")
        given = [(name, getattr(self, name)) for name in names]
        return ", ".join(f"{name}={x}" for name, x in given if x is not None)

    def route(self, inputs, training: bool = False) -> GatingResult:
        """Which experts take which tokens, without running them.

        Args:
            inputs: Float tensor `(..., features)`, not masked: what the gate sees, so
                `gate_inputs` where the layer is called with them.
            training: Bool. Whether the gate adds its noise. Defaults to
                `False`.

        Returns:
            A `GatingResult` over the flattened tokens: `gates` and
            `expert_indices` are `(tokens, k)`, or `(assignments,)` for a gate
            that gives tokens different numbers of experts.
        """
        if isinstance(inputs, keras.KerasTensor):
            raise ValueError(
                "`inputs` of `route` must be data. Received: a symbolic "
                f"{inputs!r}. Call `route` on arrays or tensors, for example in the "
                "`call` of a layer of your own."
            )
        checks.verify_dense(inputs, f"{type(self).__name__}.route")
        inputs = tf.convert_to_tensor(inputs)
        if not self.built:
            self.build(inputs.shape)
        tokens = tf.reshape(inputs, [-1, inputs.shape[-1]])
        with nothing_noted():
            result = self.gating(tokens, training=training)
        verify_gating_result(result, self.gating)
        return result

    def compute_output_shape(self, input_shape):
        last = self.experts.compute_output_shape((None, input_shape[-1]))[-1]
        return (*input_shape[:-1], last)

    def get_config(self):
        return {
            **super().get_config(),
            "experts": configs.serialize(self, self.experts),
            "gating": configs.serialize(self, self.gating),
            **loss_weights_config(self),
            "activation": keras.activations.serialize(self.activation),
            "capacity_factor": self.capacity_factor,
            "evaluation_capacity_factor": self.evaluation_capacity_factor,
            "losses_in_evaluation": self.losses_in_evaluation,
            "shared_experts": configs.serialize(self, self.shared_experts),
        }

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        config = with_capacity_of_evaluation(config)
        experts = configs.deserialize(config["experts"])
        num_experts = getattr(experts, "num_experts", None)
        gating = configs.deserialize(config.get("gating"), num_experts)
        shared = configs.deserialize(config.get("shared_experts"))
        parts = {"experts": experts, "gating": gating, "shared_experts": shared}
        return cls(**{**config, **parts})


def mixtures_of(layers: Any) -> list[MoE]:
    """The mixtures among some layers, or anywhere inside a model or layer.

    Args:
        layers: Layers, or one model or layer.
    """
    if isinstance(layers, keras.layers.Layer):
        layers = layers._flatten_layers()
    return [layer for layer in layers if isinstance(layer, MoE)]


def with_capacity_of_evaluation(config):
    """The config, in which a layer of before has the one capacity for both."""
    return {"evaluation_capacity_factor": config.get("capacity_factor"), **config}


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
