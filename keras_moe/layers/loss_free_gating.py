"""The gate of DeepSeek-V3: balanced by a bias of the choice, without a loss."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.functional.biased_choice import (
    SCORE_NORMALIZATIONS,
    SCORES,
    verify_kept_groups,
)
from keras_moe.layers.base_gating import Choice, _Gating
from keras_moe.layers.step_clock import StepClock, notes_later, only_looks
from keras_moe.types import GatingResult


@keras.saving.register_keras_serializable(package="keras_moe")
class LossFreeGating(_Gating):
    """A gate (router) whose experts share the work by a bias, without a loss.

    $g_i = s_i / \\sum_{j \\in K} s_j$ for $i \\in K = \\mathrm{TopK}(s + b, k)$, with
    $s = \\sigma(x W_g)$

    The k experts of largest score plus bias are chosen; their gates are the scores
    alone. At the end of every training step the bias rises by `bias_update_rate` for
    experts that had less than their share of the step's tokens, and falls for the
    others: $b_i \\leftarrow b_i + u \\cdot \\mathrm{sign}(\\bar c - c_i)$. There is no
    loss that works against the task, and the bias has no gradient.

    A step is what the optimizer makes of it: its counts are those of all devices, of all
    batches whose gradients are accumulated, and of all calls of a shared gate. It has
    ended when `gate_kernel` has changed: a step that leaves it as it is, bit for bit (a
    learning rate of 0), counts with the next. If `gate_kernel` alone is frozen every
    call is a step. In evaluation, and with `trainable=False`, the bias stays.

    Group-limited choice: with `num_groups` groups of neighboring experts, those of one
    device say, a token's experts come from `num_kept_groups` of them: the groups of
    largest sum of the two best $s + b$, for softmax scores of the largest.

    Args:
        k: Int. Experts for each token. Defaults to `4`.
        num_experts: Int or None. Number of experts; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        scores: `"sigmoid"` scores each expert by itself (DeepSeek-V3), `"softmax"` takes
            the softmax over all experts (DeepSeek-V2). Defaults to `"sigmoid"`.
        normalization: `"selected"` divides gates by the sum over the chosen experts;
            `"none"` leaves the scores as they are. Defaults to `"selected"`.
        scaling_factor: Float. Factor of all gates. Defaults to `1.0`.
        bias_update_rate: Float. How far a step moves the bias; 0 leaves it where it is.
            Defaults to `1e-3`.
        num_groups: Int. Groups of experts, all of one size. Defaults to `1`.
        num_kept_groups: Int. Groups that a token's experts may come from. Defaults to
            `1`.
        gate_initializer: Initial value of `gate_kernel`. Defaults to
            `"glorot_uniform"`: with zeros all scores tie, and every token would go to
            the same experts.
        use_bias: Bool. Whether the logits have a bias, which is learned and part of
            the gates. Defaults to `False`.
        z_loss_weight: Float. Weight of the router z-loss on the logits in training
            (`functional.router_z_loss`). Defaults to `0.0`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics and of the counts that move the bias.
        training: Bool. True notes the counts of the call.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, k)` float32, the chosen experts, the
        statistics.

    Losses and state:
        Weights `gate_kernel` of shape `(features, num_experts)`, with `use_bias`
        `gate_bias` `(num_experts,)`. Not trainable, and saved with the others:
        `selection_bias`, `step_bias` (that of the present step) and `step_counts`, each
        `(num_experts,)`; the state of a `StepClock`. After a step `selection_bias` is
        that of the next. No losses but a z-loss that is asked for; by default `MoE` adds
        none either: set its `importance_loss_weight` for one.

    Raises:
        ValueError: `k` is below 1 or above the experts of the kept groups; groups are
            not of one size; `scores` or `normalization` is unknown; `bias_update_rate`
            is negative; `scaling_factor` is not positive; `num_experts` is unknown when
            built; inputs are not `(tokens, features)`.

    Mixed precision: gate maths runs in float32 under every policy.

    Example:

    >>> gating = keras_moe.layers.LossFreeGating(k=2, num_experts=4)
    >>> inputs = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    >>> counts = gating(inputs, training=True).statistics.counts.numpy()
    >>> rises = gating.selection_bias.numpy() > 0
    >>> bool((rises == (counts < 4)).all())  # 4 of 8 * 2 assignments each
    True

    Reference:
        Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for
        Mixture-of-Experts", arXiv 2408.15664; DeepSeek-AI 2024, "DeepSeek-V3 Technical
        Report", section 2.1.2.
    """

    # `MoE` adds no importance loss unless asked to.
    balances_without_loss = True

    def __init__(
        self,
        k: int = 4,
        num_experts: int | None = None,
        *,
        scores: str = "sigmoid",
        normalization: str = "selected",
        scaling_factor: float = 1.0,
        bias_update_rate: float = 1e-3,
        num_groups: int = 1,
        num_kept_groups: int = 1,
        gate_initializer: Any = "glorot_uniform",
        use_bias: bool = False,
        z_loss_weight: float = 0.0,
        **kwargs: Any,
    ):
        checks.verify_choice(scores, "scores", SCORES)
        checks.verify_choice(normalization, "normalization", SCORE_NORMALIZATIONS)
        scaling_factor = checks.verify_number(
            scaling_factor, "scaling_factor", "(0, inf)"
        )
        bias_update_rate = checks.verify_weight(bias_update_rate, "bias_update_rate")
        super().__init__(
            num_experts,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            z_loss_weight=z_loss_weight,
            **kwargs,
        )
        self.k = checks.verify_k(k, num_experts)
        self.scores = scores
        self.normalization = normalization
        self.scaling_factor = scaling_factor
        self.bias_update_rate = bias_update_rate
        self.num_groups = checks.verify_positive_int(num_groups, "num_groups")
        self.num_kept_groups = checks.verify_positive_int(
            num_kept_groups, "num_kept_groups"
        )
        if self.num_experts is not None:
            self._verify_against_num_experts()

    def choices(self):
        return [
            Choice(
                self.k,
                self.num_experts,
                self.normalization,
                remedy='normalization="none"',
            )
        ]

    def _verify_against_num_experts(self):
        verify_kept_groups(
            self.k, self.num_experts, self.num_groups, self.num_kept_groups
        )

    def build(self, input_shape):
        super().build(input_shape)
        self.selection_bias = self._add_state("selection_bias")
        self.step_bias = self._add_state("step_bias")
        # In float64: a step may have more than 16 million tokens.
        self.step_counts = self._add_state("step_counts", "float64")
        self._clock = StepClock(self, self.gate_kernel)

    def _add_state(self, name, dtype=None):
        return self.add_weight(
            name=name,
            shape=(self.num_experts,),
            initializer="zeros",
            dtype=dtype,
            trainable=False,
        )

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        logits = self._logits(inputs)
        bias, note = tf.convert_to_tensor(self.selection_bias), None
        if training and self.trainable and not only_looks():
            bias, note = self._begin(logits)
        gates, experts = functional.biased_gating(
            logits,
            bias,
            self.k,
            self.scores,
            self.normalization,
            self.num_groups,
            self.num_kept_groups,
        )
        result = functional.make_gating_result(
            self.scaling_factor * gates, experts, self.num_experts, mask=mask
        )
        if note is not None and not notes_later():
            note(result.statistics.counts)
        return self._with_losses(result, logits, mask, training)

    def note_counts(self, counts: tf.Tensor, inputs: tf.Tensor) -> None:
        """Notes what a training call has noted that ran where nothing can be kept.

        For a recurrent mixture, whose gate is a pure function within the loop.

        Args:
            counts: `(num_experts,)`, the tokens of each expert over all time steps.
            inputs: A tensor of the batch.
        """
        if self.trainable:
            _, note = self._begin(inputs)
            note(counts)

    def _begin(self, inputs):
        """The bias of the present step, and what takes the counts of the call."""
        bias, before = (
            tf.convert_to_tensor(v) for v in (self.step_bias, self.step_counts)
        )
        # Of the shape of what is chosen: DTensor takes no other in `tf.where`.
        begins = self._clock.tick(inputs).begins | tf.zeros_like(bias, tf.bool)
        bias = tf.where(begins, tf.convert_to_tensor(self.selection_bias), bias)
        before = tf.where(begins, tf.zeros_like(before), before)

        def note(counts):
            counts = engine.current().replicas.sum(tf.cast(counts, before.dtype))
            total = before + counts
            self.step_counts.assign(total)
            # The step may end here: that of the next is always at hand.
            self.selection_bias.assign(
                functional.balanced_bias(bias, total, self.bias_update_rate)
            )

        with tf.control_dependencies([inputs]):
            self.step_bias.assign(bias)
        return bias, note

    def get_config(self):
        return {
            **super().get_config(),
            "k": self.k,
            "scores": self.scores,
            "normalization": self.normalization,
            "scaling_factor": self.scaling_factor,
            "bias_update_rate": self.bias_update_rate,
            "num_groups": self.num_groups,
            "num_kept_groups": self.num_kept_groups,
        }
