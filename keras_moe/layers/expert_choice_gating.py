"""The gate of expert choice: experts pick tokens, and not tokens experts."""

import math
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers.base_gating import _Gating
from keras_moe.types import GatingResult


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertChoiceGating(_Gating):
    """A gate (router) by which every expert takes the tokens that like it best.

    $S = \\mathrm{Softmax}(X W_g)$. Each expert takes the
    $C = \\lceil \\mathrm{capacity\\_factor} \\cdot N / E \\rceil$ tokens of its largest
    values, over the whole batch, and these values are the gates. Loads are equal by
    construction, and no loss is needed.

    A token has `capacity_factor` experts on average. It may have more, or none: then its
    output of the mixture is zero, and a residual connection around it carries it on.

    **Not for causal models.** Whether an expert takes a token depends on the others of
    the batch, the later ones of its sequence too: what a causal model is to predict would
    have a part in the prediction, and when it generates those tokens are not there. So
    `MoELanguageModel`, `MoELSTM` and the decoder of `MoETranslator` refuse this gate. It
    says `sees_other_tokens = True`, by which other causal layers can refuse it too. For
    encoders, and for images.

    The choice is the same in evaluation and serving: a token's experts there depend on
    what else is in the batch.

    Args:
        capacity_factor: Float. Experts for each token on average. Defaults to `2.0`.
        num_experts: Int or None. Number of experts; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        gate_initializer: Initial value of `gate_kernel`. Defaults to
            `"glorot_uniform"`: with zeros all tokens tie, and all experts would take
            the first ones of the batch.
        use_bias: Bool. Whether the logits have a bias. Defaults to `False`.
        z_loss_weight: Float. Weight of the router z-loss on the logits in training
            (`functional.router_z_loss`). Defaults to `0.0`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. Tokens marked False are never chosen and
            not counted in N.
        training: Bool. True adds the z-loss, if it has a weight.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(assignments,)` float32 in the order of the tokens, the
        chosen experts, the statistics. There are `C * num_experts` assignments.

    Losses and state:
        Weight `gate_kernel` of shape `(features, num_experts)`, and with `use_bias`
        `gate_bias` `(num_experts,)`. No losses but a z-loss that is asked for; by
        default `MoE` adds none either.

    Raises:
        ValueError: `capacity_factor` is not positive; `num_experts` is unknown when
            built; inputs are not `(tokens, features)`. `MoE` refuses a
            `capacity_factor` of its own with this gate.

    XLA: `jit_compile=True` works, in the form of meshes: `(tokens, num_experts)` gates,
    where expert -1 stands for none. On several devices experts choose from the global
    batch.

    Mixed precision: gate maths runs in float32 under every policy.

    Example:

    >>> gating = keras_moe.layers.ExpertChoiceGating(num_experts=4)
    >>> inputs = np.random.default_rng(0).normal(size=(6, 8)).astype("float32")
    >>> gating(inputs).statistics.counts.numpy().tolist()  # 2 * 6 / 4
    [3, 3, 3, 3]

    Reference:
        Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", arXiv
        2202.09368.
    """

    balances_without_loss = True
    # Also outside of training: no layer may use it where a token must not see others.
    sees_other_tokens = True

    def __init__(
        self,
        capacity_factor: float = 2.0,
        num_experts: int | None = None,
        *,
        gate_initializer: Any = "glorot_uniform",
        use_bias: bool = False,
        z_loss_weight: float = 0.0,
        **kwargs: Any,
    ):
        capacity_factor = checks.verify_number(
            capacity_factor, "capacity_factor", "(0, inf)"
        )
        super().__init__(
            num_experts,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            z_loss_weight=z_loss_weight,
            **kwargs,
        )
        self.capacity_factor = capacity_factor

    @property
    def k(self) -> int:
        """Experts for each token on average, rounded up."""
        k = math.ceil(self.capacity_factor)
        return k if self.num_experts is None else min(k, self.num_experts)

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        logits = self._logits(inputs)
        gates, selected = functional.expert_choice_gating(
            logits, self._capacity(inputs, mask), mask
        )
        result = self._result(gates, selected)
        return self._with_losses(result, logits, mask, training)

    def _result(self, gates, selected):
        if engine.current().static_shapes:
            experts = tf.range(self.num_experts) + tf.zeros_like(selected, tf.int32)
            experts = tf.where(selected, experts, -tf.ones_like(experts))
            return functional.make_gating_result(gates, experts, self.num_experts)
        assignments = tf.where(selected)  # (M, 2), in the order of the tokens
        tokens, experts = tf.unstack(tf.cast(assignments, tf.int32), axis=1)
        return functional.make_gating_result(
            tf.gather_nd(gates, assignments),
            experts,
            self.num_experts,
            token_indices=tokens,
        )

    def _capacity(self, inputs, mask):
        """Tokens of each expert, in the batch of all devices."""
        num_tokens = tf.shape(inputs)[0]
        if mask is not None:
            num_tokens = tf.reduce_sum(tf.cast(mask, tf.int64))  # GPUs count in that
        num_tokens = tf.reduce_sum(engine.current().replicas.gather(num_tokens))
        return functional.expert_choice_capacity(
            num_tokens, self.num_experts, self.capacity_factor
        )

    def get_config(self):
        return {**super().get_config(), "capacity_factor": self.capacity_factor}
