"""Gates without noise: which experts take a token, and with what weight."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, functional
from keras_moe.functional.gating import NORMALIZATIONS
from keras_moe.layers.base_gating import Choice, _Gating
from keras_moe.layers.noise import draw_rows
from keras_moe.types import GatingResult


def k_of(gating: Any) -> int | None:
    """Experts for each token, on average; None if the gate does not say.

    Args:
        gating: A gate, its own or a user's.
    """
    k = getattr(gating, "k", None)
    return k if isinstance(k, int) else None


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftmaxGating(_Gating):
    """A gate (router) that gives every token to every expert.

    $G_\\sigma(x) = \\mathrm{Softmax}(x W_g)$ (equation 2). There is no saving
    of computation; it serves as the dense reference and for few experts.

    Args:
        num_experts: Int or None. Number of experts; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        gate_initializer: Initial value of `gate_kernel`. Defaults to `"zeros"`:
            all gates are equal at the start.
        use_bias: Bool. Whether the logits have a bias. Defaults to `False`.
        z_loss_weight: Float. Weight of the router z-loss on the logits in training
            (`functional.router_z_loss`). Defaults to `0.0`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Bool. True adds the router z-loss.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, num_experts)` float32, the chosen
        experts, the statistics.

    Losses and state:
        Weight `gate_kernel` of shape `(features, num_experts)`, and with
        `use_bias` `gate_bias` `(num_experts,)`. In training `auxiliary_losses` holds
        the router z-loss, if it has a weight; all others the surrounding `MoE` forms.
        Every expert's load is the number of tokens.

    Raises:
        ValueError: `num_experts` is not positive, or unknown when built;
            inputs are not `(tokens, features)`.

    Example:

    >>> gating = keras_moe.layers.SoftmaxGating(num_experts=4)
    >>> result = gating(np.ones((3, 8), "float32"))
    >>> result.gates.numpy()[0].tolist()
    [0.25, 0.25, 0.25, 0.25]

    Reference:
        Shazeer et al. 2017, section 2.1.
    """

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        logits = self._logits(inputs)
        gates = functional.softmax_gating(logits)
        experts = tf.range(self.num_experts)
        # zeros_like and not tf.broadcast_to: the shape may be dynamic.
        expert_indices = tf.zeros_like(gates, tf.int32) + experts
        result = functional.make_gating_result(
            gates, expert_indices, self.num_experts, mask=mask
        )
        return self._with_losses(result, logits, mask, training)


@keras.saving.register_keras_serializable(package="keras_moe")
class TopKGating(_Gating):
    """A gate (router) that picks the k experts of largest logit, without noise.

    `NoisyTopKGating` without its noise: an ablation of the paper, and the gate
    of most later work. The load is a hard count and carries no gradient, so
    only the importance loss balances the experts.

    Args:
        k: Int. Experts for each token. Defaults to `4`.
        num_experts: Int or None. Number of experts; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        normalization: `"selected"` takes the softmax over the k kept logits
            (equation 3); `"all"` takes it over all logits, so that gates sum to
            less than 1 and the gate learns from the task even for `k=1`.
            Defaults to `"selected"`.
        gate_initializer: Initial value of `gate_kernel`. Defaults to
            `"glorot_uniform"`: with zeros and no noise all logits tie, and
            every token would go to experts 0 to k-1.
        use_bias: Bool. Whether the logits have a bias. Defaults to `False`.
        scaling_factor: Float above 0. Every gate is multiplied by it. Defaults to
            `1.0`.
        input_jitter: Float below 1. In training the gate sees every feature of a token
            times a number drawn evenly within `1 - input_jitter` and
            `1 + input_jitter`; the experts do not. Defaults to `0.0`.
        switch_loss_weight: Float. Weight of the auxiliary loss of Switch and GShard in
            training (`functional.switch_loss`), of the probabilities without noise.
            Defaults to `0.0`.
        z_loss_weight: Float. Weight of the router z-loss on the logits in training
            (`functional.router_z_loss`). Defaults to `0.0`.
        seed: Int, `keras.random.SeedGenerator` or None. Seed of the jitter.
            Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Bool. True adds the jitter, and losses that have a weight.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, k)` float32, the chosen experts, the
        statistics.

    Losses and state:
        Weight `gate_kernel` of shape `(features, num_experts)`, and with
        `use_bias` `gate_bias` `(num_experts,)`; with jitter the state of the seed
        generator. In training `auxiliary_losses` holds the router z-loss and that
        of Switch, where they have a weight; all others the surrounding `MoE` forms.

    Raises:
        ValueError: `k` is below 1 or above `num_experts`; `normalization` is
            unknown; a weight or a factor is out of range; `num_experts` is unknown
            when built; inputs are not `(tokens, features)`.

    Example:

    >>> gating = keras_moe.layers.TopKGating(k=2, num_experts=4)
    >>> result = gating(np.ones((3, 8), "float32"))
    >>> result.gates.shape.as_list()
    [3, 2]

    Reference:
        Shazeer et al. 2017, equations 3 and 5.
    """

    def __init__(
        self,
        k: int = 4,
        num_experts: int | None = None,
        *,
        normalization: str = "selected",
        gate_initializer: Any = "glorot_uniform",
        use_bias: bool = False,
        scaling_factor: float = 1.0,
        input_jitter: float = 0.0,
        switch_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        seed: Any = None,
        **kwargs: Any,
    ):
        k = checks.verify_k(k, num_experts)
        checks.verify_choice(normalization, "normalization", NORMALIZATIONS)
        scaling_factor = checks.verify_number(
            scaling_factor, "scaling_factor", "(0, inf)"
        )
        input_jitter = checks.verify_rate(input_jitter, "input_jitter")
        switch_loss_weight = checks.verify_weight(
            switch_loss_weight, "switch_loss_weight"
        )
        super().__init__(
            num_experts,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            z_loss_weight=z_loss_weight,
            **kwargs,
        )
        self.k = k
        self.normalization = normalization
        self.scaling_factor = scaling_factor
        self.input_jitter = input_jitter
        self.switch_loss_weight = switch_loss_weight
        self.seed = checks.verify_seed(seed)
        if self._draws:
            self.seed_generator = (
                seed
                if isinstance(seed, keras.random.SeedGenerator)
                else keras.random.SeedGenerator(self.seed)
            )

    @property
    def _draws(self):
        """Whether a training call may draw random numbers."""
        return self.input_jitter > 0.0

    def choices(self):
        return [Choice(self.k, self.num_experts, self.normalization)]

    def _verify_against_num_experts(self):
        checks.verify_k(self.k, self.num_experts)

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        logits = self._logits(self._jittered(inputs, mask, training))
        return self._with_losses(
            self._without_noise(logits, mask), logits, mask, training
        )

    def _jittered(self, inputs, mask, training):
        """The tokens as the gate sees them."""
        if not training or not self.input_jitter:
            return inputs
        uniform = draw_rows(
            tf.shape(inputs)[0],
            inputs.shape[-1],
            self.compute_dtype,
            self.seed_generator,
            mask=mask,
            kind="uniform",
        )
        return inputs * (1.0 + self.input_jitter * (2.0 * uniform - 1.0))

    def _without_noise(self, logits, mask):
        gates, experts = functional.top_k_gating(logits, self.k, self.normalization)
        return self._result(gates, experts, mask)

    def _result(self, gates, expert_indices, mask, load=None):
        if self.scaling_factor != 1.0:
            gates *= self.scaling_factor
        return functional.make_gating_result(
            gates, expert_indices, self.num_experts, load=load, mask=mask
        )

    def _losses_of(self, logits, result, mask):
        losses = super()._losses_of(logits, result, mask)
        if not self.switch_loss_weight:
            return losses
        loss = functional.switch_loss(
            functional.softmax_gating(logits),
            result.statistics.counts,
            mask,
            self.switch_loss_weight,
        )
        return (*losses, loss)

    def get_config(self):
        seed = self.seed
        if isinstance(seed, keras.random.SeedGenerator):
            seed = keras.saving.serialize_keras_object(seed)
        return {
            **super().get_config(),
            "k": self.k,
            "normalization": self.normalization,
            "scaling_factor": self.scaling_factor,
            "input_jitter": self.input_jitter,
            "switch_loss_weight": self.switch_loss_weight,
            "seed": seed,
        }

    @classmethod
    def from_config(cls, config):
        if isinstance(config.get("seed"), dict):
            seed = keras.saving.deserialize_keras_object(config["seed"])
            config = {**config, "seed": seed}
        return super().from_config(config)
