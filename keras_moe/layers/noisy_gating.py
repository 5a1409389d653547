"""The paper's gate: the k largest of noisy logits."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import engine, functional
from keras_moe.layers.gating import TopKGating
from keras_moe.layers.noise import LEARNED, NoiseLevel, draw_rows
from keras_moe.types import GatingResult


@keras.saving.register_keras_serializable(package="keras_moe")
class NoisyTopKGating(TopKGating):
    """The paper's gate (router): noisy logits, the k largest kept.

    $G(x) = \\mathrm{Softmax}(\\mathrm{KeepTopK}(H(x), k))$ (3)

    $H(x)_i = (x W_g)_i + \\mathrm{StandardNormal}() \\cdot
    \\mathrm{Softplus}((x W_{noise})_i)$ (4)

    The noise helps the experts to share the work and makes the load a smooth
    function of the weights (equation 10), so a load loss can balance it.
    At inference there is no noise.

    How much of the choice is noise: the share of the choices without noise that the
    noise leaves is `<name>_choices_kept` in the logs of `fit`.

    Gate maths runs in float32 under every mixed-precision policy.

    Args:
        k: Int. Experts for each token. Defaults to `4`.
        num_experts: Int or None. Number of experts; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        normalization: `"selected"` takes the softmax over the k kept logits
            (the paper); `"all"` takes it over all logits, so that gates sum to
            less than 1 and the gate learns from the task even for `k=1`.
            Defaults to `"selected"`.
        noise_stddev: Standard deviation of the noise. `"learned"` is that of equation
            4. A float is the same for all tokens and experts; 0 is no noise, and the
            load a count. A `keras.optimizers.schedules.LearningRateSchedule` is called
            with the number of optimizer steps that have ended, to anneal the noise.
            Defaults to `"learned"`.
        noise_epsilon: Float. Least standard deviation of the noise, added to
            the softplus as in the authors' code; 0 is equation 4 as it stands.
            Where the noise is not learned, the least one in the load (equation 9),
            whose gradient grows as the noise shrinks. Defaults to `1e-2`.
        gate_initializer: Initial value of `gate_kernel`. Defaults to `"zeros"`
            (appendix A): all experts start with the same chance.
        noise_initializer: Initial value of `noise_kernel`. Defaults to
            `"zeros"` (appendix A).
        use_bias: Bool. Whether the clean logits have a bias. Defaults to `False`.
        scaling_factor: Float above 0. As for `TopKGating`. Defaults to `1.0`.
        input_jitter: Float below 1. As for `TopKGating`. Defaults to `0.0`.
        switch_loss_weight: Float. As for `TopKGating`. Defaults to `0.0`.
        z_loss_weight: Float. As for `TopKGating`, of the logits without noise.
            Defaults to `0.0`.
        seed: Int, `keras.random.SeedGenerator` or None. Seed of the noise and the
            jitter. Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics.
        training: Bool. True adds the noise, and losses that have a weight.
        noise: Float tensor `(tokens, num_experts)` or None. Standard normal
            noise to use in training; None draws it.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, k)` float32, the chosen experts, the
        statistics.

    Losses and state:
        Weights `gate_kernel` and, if the noise is learned, `noise_kernel`, each
        `(features, num_experts)`, with `use_bias` `gate_bias` `(num_experts,)`; the
        state of the seed generator; with a schedule the number of steps. Losses as
        for `TopKGating`. The load is smooth in training if there is noise and
        `k < num_experts`, otherwise a hard count.

    Raises:
        ValueError: As for `TopKGating`; `noise_epsilon` or `noise_stddev` is
            negative, or the latter of another kind.

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
        noise_stddev: Any = LEARNED,
        noise_epsilon: float = 1e-2,
        gate_initializer: Any = "zeros",
        noise_initializer: Any = "zeros",
        use_bias: bool = False,
        scaling_factor: float = 1.0,
        input_jitter: float = 0.0,
        switch_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        seed: Any = None,
        **kwargs: Any,
    ):
        noise = NoiseLevel(noise_stddev, noise_epsilon)
        super().__init__(
            k,
            num_experts,
            normalization=normalization,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            scaling_factor=scaling_factor,
            input_jitter=input_jitter,
            switch_loss_weight=switch_loss_weight,
            z_loss_weight=z_loss_weight,
            seed=seed,
            **kwargs,
        )
        self._noise = noise
        self.noise_stddev = noise.stddev
        self.noise_epsilon = noise.epsilon
        self.noise_initializer = keras.initializers.get(noise_initializer)

    @property
    def _draws(self):
        return True

    @property
    def has_noise(self) -> bool:
        """Whether choices in training depend on noise on the logits."""
        return not self._noise.is_none

    @property
    def has_smooth_load(self) -> bool:  # type: ignore[override]
        """Whether the load in training has a gradient."""
        few = self.num_experts is None or self.k < self.num_experts
        return self.has_noise and few

    def build(self, input_shape):
        super().build(input_shape)
        if self._noise.is_learned:
            self.noise_kernel = self._add_kernel(
                "noise_kernel", input_shape[-1], self.noise_initializer
            )
        self._noise.build(self, self.gate_kernel)

    def draw_noise(
        self, num_tokens: Any, mask: Any = None, first_row: Any = None
    ) -> tf.Tensor:
        """Standard normal noise `(num_tokens, num_experts)` for a training call.

        Args:
            num_tokens: Int or `()` int32.
            mask: That of the call. Defaults to `None`.
            first_row: Tokens before these, over all devices. None means those of the
                devices before this one. Defaults to `None`.

        Returns:
            `(num_tokens, num_experts)` float32 or float64, new at every call.
        """
        self._noise.tick(num_tokens)
        return draw_rows(
            num_tokens,
            self.num_experts,
            self.compute_dtype,
            self.seed_generator,
            first_row,
            mask,
        )

    def call(self, inputs, mask=None, training=None, noise=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        inputs = self._jittered(inputs, mask, training)
        if training and self.has_noise:
            kernels = [self.gate_kernel]
            kernels += [self.noise_kernel] if self._noise.is_learned else []
            products = engine.current().operations.products(inputs, kernels)
            logits = self._with_bias(products[0])
            raw_noise = products[1] if self._noise.is_learned else None
            result = self._with_noise(logits, raw_noise, mask, noise)
        else:
            logits = self._logits(inputs)
            result = self._without_noise(logits, mask)
        return self._with_losses(result, logits, mask, training)

    def _with_noise(self, clean_logits, raw_noise, mask, noise):
        if noise is None:
            noise = self.draw_noise(tf.shape(clean_logits)[0], mask)
        gates, expert_indices, probs = self._noise.top_k_gating(
            clean_logits, raw_noise, noise, self.k, self.normalization
        )
        if self.k == self.num_experts:
            # Paper: at k = n every expert is always chosen; the load is a count.
            return self._result(gates, expert_indices, mask)
        load = functional.load(probs, mask)
        kept = functional.choices_kept(clean_logits, expert_indices, mask)
        result = self._result(gates, expert_indices, mask, load)
        return result._replace(choices_kept=kept)

    def noise_stddev_of(self, inputs: Any) -> tf.Tensor:
        """Standard deviation of the noise that tokens have in training.

        Args:
            inputs: `(tokens, features)`.

        Returns:
            `(tokens, num_experts)` float32 or float64; that of a schedule at the steps
            done so far.
        """
        inputs = tf.cast(inputs, self.compute_dtype)
        learned = self._noise.is_learned
        raw_noise = tf.matmul(inputs, self.noise_kernel) if learned else None
        return self._noise.of(self._logits(inputs), raw_noise)

    def get_config(self):
        return {
            **super().get_config(),
            "noise_stddev": self._noise.get_config(),
            "noise_epsilon": self.noise_epsilon,
            "noise_initializer": keras.initializers.serialize(self.noise_initializer),
        }
