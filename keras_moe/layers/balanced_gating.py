"""The strictly balanced gate of appendix F."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers.base_gating import _Gating
from keras_moe.types import GatingResult


@keras.saving.register_keras_serializable(package="keras_moe")
class BalancedGating(_Gating):
    """A gate (router) that gives every expert the same number of tokens.

    $G(x)_i = \\frac{G_\\sigma(x)_i M_i}{\\sum_j G_\\sigma(x)_j M_j}$ (16) with
    $G_\\sigma(x) = \\mathrm{Softmax}(x W_g)$ (15)

    In training the mask M keeps the m largest values of every expert over the
    batch (18), $m = k |X| / n$: the load is exactly equal, and no balancing loss
    is needed for it. At inference it keeps the values above a threshold of the
    expert (19), so that a token's gates do not depend on the other tokens. The
    thresholds are trained to select what the batchwise mask selects (20).

    A token has k experts on average only. It may have more, or none: then its
    output of the mixture is zero. A token of NaN takes no other token's place; it
    goes to the first expert, so that its output is NaN.

    The batchwise mask looks across the batch and across time steps. In a causal
    language model later tokens influence the selection in training, so trust
    the loss of evaluation, where thresholds select, rather than that of training.

    Paper: these choices are open there. m is rounded to the nearest whole
    number, at least 1. A token without experts gets zero. Thresholds start at
    `1 / num_experts`, the mean of the softmax. The threshold loss is divided by
    the number of tokens and trains the thresholds alone; neither it nor the masks
    give the gate a gradient. `gate_kernel` does not start at zero: all tokens
    would tie, and the first m of the batch go to every expert. There is no noise.

    Args:
        k: Int. Experts for each token on average. Defaults to `4`.
        num_experts: Int or None. Number of experts; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        threshold_loss_weight: Float. Weight of the threshold loss (equation
            20), divided by the number of tokens. With 0 the thresholds stay
            where they are. Defaults to `1.0`.
        gate_initializer: Initial value of `gate_kernel`. None means a normal
            distribution of standard deviation 0.02. Defaults to `None`.
        use_bias: Bool. Whether the logits have a bias. Defaults to `False`.
        z_loss_weight: Float. Weight of the router z-loss on the logits in training
            (`functional.router_z_loss`). Defaults to `0.0`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. Tokens marked False are neither
            routed nor counted, nor do they enter m.
        training: Bool. True selects with the batchwise mask, otherwise the
            thresholds do.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(assignments,)` float32 in the order of the
        tokens, the chosen experts, the statistics, the losses. The number of
        assignments is `m * num_experts` in training and depends on the data at
        inference.

    Losses and state:
        Weights `gate_kernel` of shape `(features, num_experts)`, `thresholds` and,
        with `use_bias`, `gate_bias` of shape `(num_experts,)`. In training `auxiliary_losses`
        holds the threshold loss, and the router z-loss if it has a weight, which the
        surrounding `MoE` adds; at inference
        it is empty, since the masks would need the batch: the loss of an
        evaluation is without it. The load is a hard count and constant in
        training, so a load loss has no gradient, and `MoE` adds none unless asked
        to. An importance loss does have one.

    Raises:
        ValueError: `k` is below 1 or above `num_experts`;
            a weight of a loss is negative; `num_experts` is unknown when
            built; inputs are not `(tokens, features)`. `MoE` refuses a
            `capacity_factor` with this gate.

    XLA: `jit_compile=True` works, in the form of meshes: `(tokens, num_experts)`
    gates, where expert -1 stands for none.

    Mixed precision: gate maths runs in float32 under every policy.

    Example:

    >>> gating = keras_moe.layers.BalancedGating(k=2, num_experts=4)
    >>> inputs = np.random.default_rng(0).normal(size=(6, 8))
    >>> result = gating(inputs, training=True)  # m = 2 * 6 / 4
    >>> result.statistics.counts.numpy().tolist()
    [3, 3, 3, 3]

    Reference:
        Shazeer et al. 2017, appendix F.
    """

    def __init__(
        self,
        k: int = 4,
        num_experts: int | None = None,
        *,
        threshold_loss_weight: float = 1.0,
        gate_initializer: Any = None,
        use_bias: bool = False,
        z_loss_weight: float = 0.0,
        **kwargs: Any,
    ):
        k = checks.verify_k(k, num_experts)
        threshold_loss_weight = checks.verify_weight(
            threshold_loss_weight, "threshold_loss_weight"
        )
        if gate_initializer is None:
            gate_initializer = keras.initializers.RandomNormal(stddev=0.02)
        super().__init__(
            num_experts,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            z_loss_weight=z_loss_weight,
            **kwargs,
        )
        self.k = k
        self.threshold_loss_weight = threshold_loss_weight

    def _verify_against_num_experts(self):
        checks.verify_k(self.k, self.num_experts)

    def build(self, input_shape):
        super().build(input_shape)
        self.thresholds = self.add_weight(
            name="thresholds",
            shape=(self.num_experts,),
            initializer=keras.initializers.Constant(1.0 / self.num_experts),
        )

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        real = None
        if engine.current().static_shapes:
            return self._dense(inputs, mask, training)
        if mask is not None:
            # Padding must not compete with real tokens for a place.
            real = tf.cast(tf.where(mask)[:, 0], tf.int32)
            inputs = tf.gather(inputs, real)
        logits = self._logits(inputs)
        softmax_gates, broken = _without_nan(functional.softmax_gating(logits))
        selected, losses = self._select(softmax_gates, training)
        selected |= broken
        assignments = tf.where(selected)  # (M, 2), in the order of the tokens
        token_indices, expert_indices = tf.unstack(
            tf.cast(assignments, tf.int32), axis=1
        )
        if real is not None:
            token_indices = tf.gather(real, token_indices)
        result = functional.make_gating_result(
            tf.gather_nd(functional.masked_gating(logits, selected), assignments),
            expert_indices,
            self.num_experts,
            token_indices=token_indices,
        )
        result = result._replace(auxiliary_losses=losses)
        return self._with_losses(result, logits, None, training)

    def _dense(self, inputs, mask, training):
        """The result in static shapes: every expert a choice, -1 if not selected."""
        logits = self._logits(inputs)
        softmax_gates, broken = _without_nan(functional.softmax_gating(logits))
        if mask is not None:
            # Below every threshold and behind every real token.
            softmax_gates = tf.where(
                mask[:, tf.newaxis], softmax_gates, -tf.ones_like(softmax_gates)
            )
        selected, losses = self._select(softmax_gates, training, mask)
        selected |= broken
        if mask is not None:
            selected &= mask[:, tf.newaxis]
        experts = tf.range(self.num_experts) + tf.zeros_like(selected, tf.int32)
        result = functional.make_gating_result(
            functional.masked_gating(logits, selected),
            tf.where(selected, experts, -tf.ones_like(experts)),
            self.num_experts,
        )
        result = result._replace(auxiliary_losses=losses)
        return self._with_losses(result, logits, mask, training)

    def _select(self, softmax_gates, training, mask=None):
        """The mask `(N, E)` and the losses that come with it."""
        thresholds = tf.convert_to_tensor(self.thresholds)
        if not training:
            return functional.threshold_mask(softmax_gates, thresholds), ()
        # The batch is that of all devices.
        here = engine.current()
        num_tokens = tf.reduce_sum(here.replicas.gather(tf.shape(softmax_gates)[0]))
        if mask is not None:
            num_tokens = tf.reduce_sum(tf.cast(mask, tf.int64))  # GPUs count in that
        m = functional.tokens_per_expert(num_tokens, self.num_experts, self.k)
        # Gates are not negative: what pads the columns of several devices loses.
        selected = here.operations.over_columns(
            softmax_gates, lambda gates: functional.batchwise_mask(gates, m), -1.0
        )
        if not self.threshold_loss_weight:
            return selected, ()
        loss = functional.threshold_loss(softmax_gates, thresholds, m, selected)
        mean = here.replicas.sum(loss) / tf.cast(tf.maximum(num_tokens, 1), loss.dtype)
        return selected, (self.threshold_loss_weight * mean,)

    def get_config(self):
        return {
            **super().get_config(),
            "k": self.k,
            "threshold_loss_weight": self.threshold_loss_weight,
        }


def _without_nan(softmax_gates):
    """Gates in which a token of NaN loses against every other, and where those are.

    Returns:
        `(N, E)` gates, -1 throughout for such a token; `(N, E)` bool, True at the
        first expert for such a token.
    """
    broken = tf.math.is_nan(softmax_gates)
    gates = tf.where(broken, -tf.ones_like(softmax_gates), softmax_gates)
    first = tf.range(softmax_gates.shape[-1]) == 0
    return gates, broken & first
