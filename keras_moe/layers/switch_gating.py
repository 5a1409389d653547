"""The gate of Switch Transformers: one expert for each token."""

from typing import Any

import keras

from keras_moe import checks
from keras_moe.layers.gating import TopKGating


@keras.saving.register_keras_serializable(package="keras_moe")
class SwitchGating(TopKGating):
    """The gate (router) of Switch Transformers: one expert, weighed by its probability.

    $G(x)_i = \\mathrm{Softmax}(x W_g)_i$ for the expert of largest probability, else 0
    (Fedus et al. 2021, equation 2).

    That is `TopKGating(k=1, normalization="all")`, with the input jitter and the loss
    of its authors. Give the surrounding `MoE` `importance_loss_weight=0.0` if this
    loss is to be the only one that balances, and a `capacity_factor` (theirs is 1.0 to
    2.0) if tokens are to be dropped as there.

    Args:
        num_experts: Int or None. Number of experts; None takes it from the
            experts of the surrounding `MoE`. Defaults to `None`.
        input_jitter: Float below 1. In training the gate sees every feature of a token
            times a number drawn evenly within `1 - input_jitter` and
            `1 + input_jitter`; the experts do not. Defaults to `0.01`.
        switch_loss_weight: Float. Weight of the auxiliary loss in training
            (`functional.switch_loss`). Defaults to `0.01`.
        z_loss_weight: Float. Weight of the router z-loss in training
            (`functional.router_z_loss`); that of ST-MoE is 0.001. Defaults to `0.0`.
        scaling_factor: Float above 0. Every gate is multiplied by it. Defaults to
            `1.0`.
        gate_initializer: Initial value of `gate_kernel`. Defaults to
            `"glorot_uniform"`: with zeros all logits tie, and every token would go to
            the first expert.
        use_bias: Bool. Whether the logits have a bias. Defaults to `False`.
        seed: Int, `keras.random.SeedGenerator` or None. Seed of the jitter.
            Defaults to `None`.

    Call arguments:
        inputs: Float tensor `(tokens, features)`.
        mask: Bool tensor `(tokens,)` or None. False leaves a token out of the
            statistics and the losses.
        training: Bool. True adds the jitter and the losses.

    Input shape:
        `(tokens, features)`.

    Output shape:
        A `GatingResult`: gates `(tokens, 1)` float32, the chosen experts, the
        statistics, the losses.

    Losses and state:
        As for `TopKGating`.

    Raises:
        ValueError: `k` or `normalization` is given; a weight or a factor is out of
            range; `num_experts` is unknown when built; inputs are not
            `(tokens, features)`.

    Example:

    >>> gating = keras_moe.layers.SwitchGating(num_experts=4)
    >>> result = gating(np.ones((3, 8), "float32"), training=True)
    >>> result.gates.shape.as_list(), len(result.auxiliary_losses)
    ([3, 1], 1)

    Reference:
        Fedus et al. 2021, "Switch Transformers: Scaling to Trillion Parameter Models
        with Simple and Efficient Sparsity", section 2.
    """

    def __init__(
        self,
        num_experts: int | None = None,
        *,
        input_jitter: float = 0.01,
        switch_loss_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        scaling_factor: float = 1.0,
        gate_initializer: Any = "glorot_uniform",
        use_bias: bool = False,
        seed: Any = None,
        **kwargs: Any,
    ):
        fixed = {"k": 1, "normalization": "all"}
        checks.verify_fixed(kwargs, type(self).__name__, **fixed)
        super().__init__(
            1,
            num_experts,
            normalization="all",
            input_jitter=input_jitter,
            switch_loss_weight=switch_loss_weight,
            z_loss_weight=z_loss_weight,
            scaling_factor=scaling_factor,
            gate_initializer=gate_initializer,
            use_bias=use_bias,
            seed=seed,
            **kwargs,
        )

    def get_config(self):
        config = super().get_config()
        for name in ("k", "normalization"):
            del config[name]
        return config
