"""Gates: which experts take a token, and with what weight."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
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

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Not used.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, num_experts)` float32, the chosen
        experts, the statistics.

    Losses and state:
        Weight `gate_kernel` of shape `(features, num_experts)`, and with
        `use_bias` `gate_bias` `(num_experts,)`. No losses: the surrounding
        `MoE` forms them. Every expert's load is the number of tokens.

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
        gates = functional.softmax_gating(self._logits(inputs))
        experts = tf.range(self.num_experts)
        # zeros_like and not tf.broadcast_to: the shape may be dynamic.
        expert_indices = tf.zeros_like(gates, tf.int32) + experts
        return functional.make_gating_result(
            gates, expert_indices, self.num_experts, mask=mask
        )


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

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Not used.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, k)` float32, the chosen experts, the
        statistics.

    Losses and state:
        Weight `gate_kernel` of shape `(features, num_experts)`, and with
        `use_bias` `gate_bias` `(num_experts,)`. No losses: the surrounding
        `MoE` forms them.

    Raises:
        ValueError: `k` is below 1 or above `num_experts`; `normalization` is
            unknown; `num_experts` is unknown when built; inputs are not
            `(tokens, features)`.

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
        **kwargs: Any,
    ):
        k = checks.verify_k(k, num_experts)
        checks.verify_choice(normalization, "normalization", NORMALIZATIONS)
        super().__init__(
            num_experts, gate_initializer=gate_initializer, use_bias=use_bias, **kwargs
        )
        self.k = k
        self.normalization = normalization

    def choices(self):
        return [Choice(self.k, self.num_experts, self.normalization)]

    def _verify_against_num_experts(self):
        checks.verify_k(self.k, self.num_experts)

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        return self._without_noise(self._logits(inputs), mask)

    def _without_noise(self, logits, mask):
        gates, experts = functional.top_k_gating(logits, self.k, self.normalization)
        return self._result(gates, experts, mask)

    def _result(self, gates, expert_indices, mask, load=None):
        return functional.make_gating_result(
            gates, expert_indices, self.num_experts, load=load, mask=mask
        )

    def get_config(self):
        return {
            **super().get_config(),
            "k": self.k,
            "normalization": self.normalization,
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class NoisyTopKGating(TopKGating):
    """The paper's gate (router): noisy logits, the k largest kept.

    $G(x) = \\mathrm{Softmax}(\\mathrm{KeepTopK}(H(x), k))$ (3)

    $H(x)_i = (x W_g)_i + \\mathrm{StandardNormal}() \\cdot
    \\mathrm{Softplus}((x W_{noise})_i)$ (4)

    The noise helps the experts to share the work and makes the load a smooth
    function of the weights (equation 10), so a load loss can balance it.
    At inference there is no noise.

    Gate maths runs in float32 under every mixed-precision policy.

    Args:
        k: Int. Experts for each token. Defaults to `4`.
        num_experts: Int or None. Number of experts; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        normalization: `"selected"` takes the softmax over the k kept logits
            (the paper); `"all"` takes it over all logits, so that gates sum to
            less than 1 and the gate learns from the task even for `k=1`.
            Defaults to `"selected"`.
        noise_epsilon: Float. Least standard deviation of the noise, added to
            the softplus as in the authors' code; 0 is equation 4 as it stands.
            Defaults to `1e-2`.
        gate_initializer: Initial value of `gate_kernel`. Defaults to `"zeros"`
            (appendix A): all experts start with the same chance.
        noise_initializer: Initial value of `noise_kernel`. Defaults to
            `"zeros"` (appendix A).
        use_bias: Bool. Whether the clean logits have a bias. Defaults to `False`.
        seed: Int, `keras.random.SeedGenerator` or None. Seed of the noise.
            Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Bool. True adds the noise.
        noise: Float tensor `(tokens, num_experts)` or None. Standard normal
            noise to use in training; None draws it.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, k)` float32, the chosen experts, the
        statistics.

    Losses and state:
        Weights `gate_kernel` and `noise_kernel`, each `(features,
        num_experts)`, with `use_bias` `gate_bias` `(num_experts,)`; the state of
        the seed generator. No losses: the surrounding `MoE` forms them. The load
        is smooth in training if `k < num_experts`, otherwise a hard count.

    Raises:
        ValueError: `k` is below 1 or above `num_experts`; `normalization` is
            unknown; `noise_epsilon` is negative; `num_experts` is unknown when
            built; inputs are not `(tokens, features)`.

    Example:

    >>> gating = keras_moe.layers.NoisyTopKGating(k=2, num_experts=4)
    >>> result = gating(np.ones((3, 8), "float32"), training=True)
    >>> int(sum(result.statistics.counts)), result.gates.shape.as_list()
    (6, [3, 2])

    Reference:
        Shazeer et al. 2017, section 2.1 and appendix A.
    """

    def __init__(
        self,
        k: int = 4,
        num_experts: int | None = None,
        *,
        normalization: str = "selected",
        noise_epsilon: float = 1e-2,
        gate_initializer: Any = "zeros",
        noise_initializer: Any = "zeros",
        use_bias: bool = False,
        seed: Any = None,
        **kwargs: Any,
    ):
        noise_epsilon = checks.verify_weight(noise_epsilon, "noise_epsilon")
        super().__init__(
            k,
            num_experts,
            normalization=normalization,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            **kwargs,
        )
        self.noise_epsilon = noise_epsilon
        self.noise_initializer = keras.initializers.get(noise_initializer)
        self.seed = seed = checks.verify_seed(seed)
        self.seed_generator = (
            seed
            if isinstance(seed, keras.random.SeedGenerator)
            else keras.random.SeedGenerator(seed)
        )

    @property
    def has_smooth_load(self) -> bool:  # type: ignore[override]
        """Whether the load in training has a gradient."""
        return self.num_experts is None or self.k < self.num_experts

    def build(self, input_shape):
        super().build(input_shape)
        self.noise_kernel = self._add_kernel(
            "noise_kernel", input_shape[-1], self.noise_initializer
        )

    def draw_noise(self, num_tokens: Any, mask: Any = None) -> tf.Tensor:
        """Standard normal noise `(num_tokens, num_experts)` for a call.

        Args:
            num_tokens: Int or `()` int32.
            mask: That of the call. Defaults to `None`.

        Returns:
            `(num_tokens, num_experts)` float32 or float64, new at every call.
        """
        return draw_rows(
            num_tokens,
            self.num_experts,
            self.compute_dtype,
            self.seed_generator,
            mask=mask,
        )

    def call(self, inputs, mask=None, training=None, noise=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        if not training:
            return self._without_noise(self._logits(inputs), mask)
        kernels = [self.gate_kernel, self.noise_kernel]
        clean_logits, raw_noise = engine.current().operations.products(inputs, kernels)
        clean_logits = self._with_bias(clean_logits)
        if noise is None:
            noise = self.draw_noise(tf.shape(clean_logits)[0], mask)
        gates, expert_indices, probs = functional.noisy_top_k_gating(
            clean_logits,
            raw_noise,
            noise,
            self.k,
            self.normalization,
            self.noise_epsilon,
        )
        # Paper: at k = n every expert is always chosen; the load is a count.
        load = functional.load(probs, mask) if self.k < self.num_experts else None
        return self._result(gates, expert_indices, mask, load)

    def get_config(self):
        seed = self.seed
        if isinstance(seed, keras.random.SeedGenerator):
            seed = keras.saving.serialize_keras_object(seed)
        return {
            **super().get_config(),
            "noise_epsilon": self.noise_epsilon,
            "noise_initializer": keras.initializers.serialize(self.noise_initializer),
            "seed": seed,
        }

    @classmethod
    def from_config(cls, config):
        if isinstance(config.get("seed"), dict):
            seed = keras.saving.deserialize_keras_object(config["seed"])
            config = {**config, "seed": seed}
        return super().from_config(config)
