"""What all gates of this package share."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_moe import checks, functional
from keras_moe.types import GatingResult, at_least_float32


class Choice(NamedTuple):
    """One top-k choice of a gate, and how a warning calls it."""

    k: int
    num_choices: int
    normalization: str
    of: str = "num_experts"
    gate: str = "the gate"
    remedy: str = 'normalization="all"'


class _Gating(checks.FromConfig, keras.layers.Layer):
    """What all gates of this package share: size, dtype, kernel, checks."""

    # Whether the load in training has a gradient: only then is there a load loss.
    has_smooth_load = False

    def __init__(
        self,
        num_experts: int | None = None,
        *,
        gate_initializer: Any = "zeros",
        use_bias: bool = False,
        z_loss_weight: float = 0.0,
        dtype: Any = None,
        **kwargs: Any,
    ):
        z_loss_weight = checks.verify_weight(z_loss_weight, "z_loss_weight")
        # Gate maths runs in float32 under every mixed-precision policy: a
        # policy that computes in half precision is replaced by its variables'
        # type, which also keeps Keras from casting the inputs down.
        policy = keras.dtype_policies.get(dtype or keras.config.dtype_policy())
        policy = keras.dtype_policies.DTypePolicy(
            at_least_float32(policy.compute_dtype).name
        )
        super().__init__(dtype=policy, **kwargs)
        if num_experts is not None:
            num_experts = checks.verify_positive_int(num_experts, "num_experts")
        # Set by the surrounding MoE where it is left out.
        self.num_experts: Any = num_experts
        self.gate_initializer = keras.initializers.get(gate_initializer)
        self.use_bias = bool(use_bias)
        self.z_loss_weight = z_loss_weight
        self.supports_masking = True

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Does nothing: gates choose by float32, where `Model.quantize` asks all layers."""

    def build(self, input_shape):
        features = checks.verify_input_shape(input_shape, type(self).__name__)
        if len(input_shape) != 2:
            raise ValueError(
                f"`inputs` of {type(self).__name__} must be (tokens, features). "
                f"Received: shape={tuple(input_shape)}, rank={len(input_shape)}. "
                "Flatten the leading dimensions, or use the gate inside `MoE`."
            )
        if self.num_experts is None:
            raise ValueError(
                f"`num_experts` of {type(self).__name__} is not known. Received: "
                "num_experts=None. Pass it, or use the gate inside `MoE`, which "
                "takes it from its experts."
            )
        self._verify_against_num_experts()
        self.gate_kernel = self._add_kernel(
            "gate_kernel", features, self.gate_initializer
        )
        if self.use_bias:
            self.gate_bias = self._add_bias()

    def _add_bias(self):
        return self.add_weight(
            name="gate_bias", shape=(self.num_experts,), initializer="zeros"
        )

    def _verify_call(self, inputs, mask):
        """The mask as a tensor, or an error if a gate cannot take the two."""
        checks.verify_dense(inputs, type(self).__name__)
        checks.verify_floating(inputs.dtype, type(self).__name__)
        return checks.verify_mask(mask, inputs.shape[:1])

    def _logits(self, inputs):
        return self._with_bias(tf.matmul(inputs, self.gate_kernel))

    def _with_bias(self, logits):
        return logits + self.gate_bias if self.use_bias else logits

    def _losses_of(self, logits, result, mask):
        """What is added in training, of the logits without noise.

        Args:
            logits: `(N, E)` float.
            result: The `GatingResult`.
            mask: `(N,)` bool or None.
        """
        weight = self.z_loss_weight
        return (functional.router_z_loss(logits, mask, weight),) if weight else ()

    def _with_losses(self, result, logits, mask, training) -> GatingResult:
        """The result of a call, in training with the losses on its logits."""
        if not training:
            return result
        losses = self._losses_of(logits, result, mask)
        return result._replace(auxiliary_losses=(*result.auxiliary_losses, *losses))

    def choices(self):
        """The `Choice`s of a top-k gate."""
        return []

    def _add_kernel(self, name, features, initializer):
        return self.add_weight(
            name=name, shape=(features, self.num_experts), initializer=initializer
        )

    def _verify_against_num_experts(self):
        pass

    def compute_mask(self, inputs, mask=None):
        # The result is a tuple of routing tensors, none of which is a sequence.
        return None

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "gate_initializer": keras.initializers.serialize(self.gate_initializer),
            "use_bias": self.use_bias,
            "z_loss_weight": self.z_loss_weight,
        }
