"""The gate of GShard: two experts a token, the second by lot."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.functional.second_choice import SECOND_POLICIES
from keras_moe.layers.base_gating import _Gating
from keras_moe.layers.gating import TopKGating
from keras_moe.layers.noise import draw_rows
from keras_moe.types import GatingResult


@keras.saving.register_keras_serializable(package="keras_moe")
class GShardGating(TopKGating):
    """A gate (router) of two experts a token, of which the second is used if worth it.

    $g_1, g_2 = \\mathrm{Softmax}$ of the two largest of $x W_g$. In training the second
    expert is used with probability $2 g_2$, 1 where both are as good: little gates are
    spared, and what they send is small on average. Where it is not used the token has
    one expert, and no work is done for the other; $g_1$ stays as it is.

    At inference the lot is not drawn and both experts are used, so that outputs are not
    random. (Mesh TensorFlow draws there too; published models mostly use both.)

    Args:
        num_experts: Int or None. Number of experts, at least 2; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        second_policy: When the second expert is used: `"random"` as above, `"all"`
            always, `"threshold"` if $g_2$ is above `second_threshold`, at inference
            too. Defaults to `"random"`.
        second_threshold: Float below 1, for `"threshold"`. Defaults to `0.2`.
        switch_loss_weight: Float. Weight of the paper's auxiliary loss in training
            (`functional.switch_loss`), with the shares of the first choices. Defaults
            to `0.01`.
        z_loss_weight: Float. As for `TopKGating`. Defaults to `0.0`.
        scaling_factor: Float above 0. As for `TopKGating`. Defaults to `1.0`.
        input_jitter: Float below 1. As for `TopKGating`. Defaults to `0.0`.
        gate_initializer: Initial value of `gate_kernel`. Defaults to
            `"glorot_uniform"`: with zeros all logits tie.
        use_bias: Bool. Whether the logits have a bias. Defaults to `False`.
        seed: Int, `keras.random.SeedGenerator` or None. Seed of the lots. Defaults to
            `None`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics and the losses.
        training: Bool. True draws the lots, and adds the losses.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`. Where both experts are always used gates are `(tokens, 2)`
        float32; otherwise `(assignments,)` in the order of the tokens.

    Losses and state:
        As for `TopKGating`; the state of the seed generator.

    Raises:
        ValueError: There are fewer than two experts; `k` or `normalization` is given;
            `second_policy` is unknown; a weight or a factor is out of range; inputs are
            not `(tokens, features)`.

    XLA: `jit_compile=True` works, with gates `(tokens, 2)` where expert -1 stands for
    none, as on meshes. With a `capacity_factor` of the mixture first choices come before
    second ones.

    Mixed precision: gate maths runs in float32 under every policy.

    Example:

    >>> gating = keras_moe.layers.GShardGating(num_experts=4, seed=0)
    >>> inputs = np.random.default_rng(0).normal(size=(100, 8)).astype("float32")
    >>> 100 < int(sum(gating(inputs, training=True).statistics.counts)) < 200
    True
    >>> int(sum(gating(inputs).statistics.counts))
    200

    Reference:
        Lepikhin et al. 2020, "GShard: Scaling Giant Models with Conditional Computation
        and Automatic Sharding", arXiv 2006.16668, section 2.2 and algorithm 1.
    """

    # Of a token: by it a capacity takes results with different numbers of experts.
    most_experts = 2

    def __init__(
        self,
        num_experts: int | None = None,
        *,
        second_policy: str = "random",
        second_threshold: float = 0.2,
        switch_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        scaling_factor: float = 1.0,
        input_jitter: float = 0.0,
        gate_initializer: Any = "glorot_uniform",
        use_bias: bool = False,
        seed: Any = None,
        **kwargs: Any,
    ):
        fixed = {"k": 2, "normalization": "selected"}
        checks.verify_fixed(kwargs, type(self).__name__, **fixed)
        checks.verify_choice(second_policy, "second_policy", SECOND_POLICIES)
        self.second_policy = second_policy
        self.second_threshold = checks.verify_rate(second_threshold, "second_threshold")
        super().__init__(
            2,
            num_experts,
            switch_loss_weight=switch_loss_weight,
            z_loss_weight=z_loss_weight,
            scaling_factor=scaling_factor,
            input_jitter=input_jitter,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            seed=seed,
            **kwargs,
        )

    @property
    def _draws(self):
        return self.second_policy == "random" or super()._draws

    def call(self, inputs, mask=None, training=None) -> GatingResult:
        mask = self._verify_call(inputs, mask)
        logits = self._logits(self._jittered(inputs, mask, training))
        policy, uniform = self.second_policy, None
        if policy == "random":
            policy = "random" if training else "all"
        if policy == "random":
            uniform = self._lots(logits, mask)
        gates, experts = functional.second_choice_gating(
            logits, policy, uniform, self.second_threshold
        )
        gates, tokens = self.scaling_factor * gates, None
        if policy != "all" and not engine.current().static_shapes:
            used = experts >= 0
            tokens = tf.cast(tf.where(used)[:, 0], tf.int32)
            gates, experts = (tf.boolean_mask(x, used) for x in (gates, experts))
        result = functional.make_gating_result(
            gates, experts, self.num_experts, token_indices=tokens, mask=mask
        )
        return self._with_losses(result, logits, mask, training)

    def _lots(self, logits, mask):
        num_tokens, dtype = tf.shape(logits)[0], self.compute_dtype
        generator = self.seed_generator
        lots = draw_rows(num_tokens, 1, dtype, generator, mask=mask, kind="uniform")
        return lots[:, 0]

    def _losses_of(self, logits, result, mask):
        losses = _Gating._losses_of(self, logits, result, mask)
        if not self.switch_loss_weight:
            return losses
        _, first = functional.top_k_gating(logits, 1)
        counts = functional.make_gating_result(
            tf.ones_like(first, logits.dtype), first, self.num_experts, mask=mask
        ).statistics.counts
        probabilities = functional.softmax_gating(logits)
        weight = self.switch_loss_weight
        return *losses, functional.switch_loss(probabilities, counts, mask, weight)

    def get_config(self):
        config = super().get_config()
        for name in ("k", "normalization"):
            del config[name]
        return {
            **config,
            "second_policy": self.second_policy,
            "second_threshold": self.second_threshold,
        }
