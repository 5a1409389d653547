"""Several gates over one set of experts: a mixture for each of several tasks."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers import configs
from keras_moe.layers.base_experts import Experts
from keras_moe.layers.gate_contract import verify_gating
from keras_moe.layers.gating import SoftmaxGating
from keras_moe.layers.moe import MoE, default_name
from keras_moe.layers.tracking import track_entries


@keras.saving.register_keras_serializable(package="keras_moe")
class MultiGateMoE(keras.layers.Layer):
    """Experts that several tasks share, each task with a gate of its own (MMoE).

    $y_t = \\sum_i G_t(x)_i E_i(x)$ for task t. What tasks have in common an expert can
    learn once; where they differ their gates choose differently. Every task's mixture is
    a `MoE` over the same experts, with its losses, masks and logs.

    With `SoftmaxGating` for all tasks, the usual form for few experts, every expert runs
    once on every token, however many tasks there are. With sparse gates the tasks choose
    different experts and each pays for its own.

    Args:
        experts: `FeedForwardExperts`, or others that `MoE` takes.
        gatings: A gate for each task, or an int: so many `SoftmaxGating`.
        importance_loss_weight: Float. As for `MoE`, for each task. Defaults to `0.0`:
            with a softmax over all experts nothing needs to be balanced.
        load_loss_weight: Float or None. As for `MoE`, for each task. Defaults to `0.0`.
        activation: Activation of each output. Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(..., features)`.
        mask: Bool tensor of the leading dimensions, or None, as for `MoE`.
        training: Bool. As for `MoE`.
        gate_inputs: As for `MoE`: what all gates see in place of `inputs`.

    Input shape:
        `(..., features)`, rank 2 or more.

    Output shape:
        A list with an output `(..., output_units)` for each task.

    Losses and state:
        Those of a `MoE` for each task, named `<name>_task_<number>` in the logs.
        Weights are those of the experts, once, and of the gates.

    Raises:
        ValueError: There is no gate; as for `MoE`.

    Example:

    >>> layer = keras_moe.layers.MultiGateMoE(
    ...     keras_moe.layers.FeedForwardExperts(8, hidden_units=16), gatings=2
    ... )
    >>> clicks, purchases = layer(np.ones((5, 4), "float32"))
    >>> clicks.shape.as_list(), len(layer.weights)
    ([5, 4], 4)

    Reference:
        Ma et al. 2018, "Modeling task relationships in multi-task learning with
        multi-gate mixture-of-experts", equation 6.
    """

    def __init__(
        self,
        experts: keras.layers.Layer,
        gatings: int | Sequence[keras.layers.Layer],
        *,
        importance_loss_weight: float = 0.0,
        load_loss_weight: float | None = 0.0,
        activation: Any = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name or default_name("multi_gate_moe"), **kwargs)
        if not isinstance(gatings, list | tuple):
            number = checks.verify_positive_int(gatings, "gatings")
            # Of zeros, all gates are equal and learn the same of the same experts.
            gatings = [
                SoftmaxGating(
                    gate_initializer="glorot_uniform", dtype=self.dtype_policy
                )
                for _ in range(number)
            ]
        if not gatings:
            raise ValueError(
                "`gatings` must have a gate for each task. Received: gatings=[]. Pass "
                "at least one, or a number of tasks."
            )
        for task, gating in enumerate(gatings):
            verify_gating(gating, f"gatings[{task}]")
        self.experts = experts
        self.gatings = list(gatings)
        self.importance_loss_weight = importance_loss_weight
        self.load_loss_weight = load_loss_weight
        self.activation = keras.activations.get(activation)
        self.supports_masking = True
        configs.hold(self, experts, *self.gatings)
        self.mixtures = [
            _TaskMoE(
                experts,
                gating,
                importance_loss_weight=importance_loss_weight,
                load_loss_weight=load_loss_weight,
                activation=activation,
                name=f"{self.name}_task_{task}",
                dtype=self.dtype_policy,
            )
            for task, gating in enumerate(self.gatings)
        ]
        track_entries(self, "mixtures")
        for mixture in self.mixtures:
            configs.release(mixture, experts, mixture.gating)
        self.supports_jit = self.mixtures[0].supports_jit

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.experts.num_experts

    def build(self, inputs_shape, gate_inputs_shape=None):
        features = checks.verify_input_shape(inputs_shape, type(self).__name__)
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: features})
        for mixture in self.mixtures:
            if not mixture.built:
                mixture.build(inputs_shape, gate_inputs_shape)
                mixture.built = True

    def call(self, inputs, mask=None, training=None, gate_inputs=None):
        dispatcher = _AllExperts() if self._runs_all_experts_once() else None
        outputs = []
        for mixture in self.mixtures:
            mixture.dispatcher = dispatcher
            try:
                outputs.append(
                    mixture(
                        inputs, mask=mask, training=training, gate_inputs=gate_inputs
                    )
                )
            finally:
                mixture.dispatcher = None
        return outputs

    def compute_output_shape(self, inputs_shape, gate_inputs_shape=None):
        return [each.compute_output_shape(inputs_shape) for each in self.mixtures]

    def compute_mask(self, inputs, mask=None):
        return [mask] * len(self.mixtures)

    def get_config(self):
        return {
            **super().get_config(),
            "experts": configs.serialize(self, self.experts),
            "gatings": [
                configs.serialize(self, gating, index)
                for index, gating in enumerate(self.gatings, 1)
            ],
            "importance_loss_weight": self.importance_loss_weight,
            "load_loss_weight": self.load_loss_weight,
            "activation": keras.activations.serialize(self.activation),
        }

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        experts = configs.deserialize(config["experts"])
        number = getattr(experts, "num_experts", None)
        gatings = [configs.deserialize(each, number) for each in config["gatings"]]
        return cls(**{**config, "experts": experts, "gatings": gatings})

    def _runs_all_experts_once(self):
        # On several devices rows travel to their experts: for each task by itself.
        return (
            isinstance(self.experts, Experts)
            and all(type(gating) is SoftmaxGating for gating in self.gatings)
            and not engine.current().several_devices
        )


class _TaskMoE(MoE):
    """The mixture of one task."""

    dispatcher: functional.Dispatcher | None = None  # of the call that runs

    def _dispatcher(self, training):
        return self.dispatcher or super()._dispatcher(training)


class _AllExperts(functional.Dispatcher):
    """All experts on all tokens, once for several gates that choose all of them."""

    def __init__(self):
        self.static_shapes = engine.current().static_shapes
        self._answers = None

    def mix(self, experts, tokens, result, mask=None):
        if self._answers is None:
            shape = tf.concat([[experts.num_experts], tf.shape(tokens)], axis=0)
            every = tf.broadcast_to(tokens, shape)
            every.set_shape([experts.num_experts, *tokens.shape])
            self._answers = experts(every)  # (E, N, output_units)
        gates = tf.cast(result.gates, self._answers.dtype)
        outputs = tf.einsum("ne,end->nd", gates, self._answers)
        if mask is not None:
            outputs = tf.where(mask[:, tf.newaxis], outputs, tf.zeros_like(outputs))
        return functional.Mixed(outputs, tf.constant(0))
