"""Balance by a bias of the choice, without a loss (DeepSeek-V3), on real text.

    python examples/paper/loss_free_balance.py

The language model of E3 (64 experts, the embedded corpus, two passes of 345 steps) with
`LossFreeGating`, and with the paper's noisy gate and its losses at 0.1.

Checks: over the second pass of training the busiest expert has at most 1.3 times the mean
load with the bias, and the perplexity of the test text is not above that with the paper's
losses; where the bias stays 0 the load is uneven. The load of the test text is shown: there
is no dropout before the gate there, and the bias was balanced with it.
"""

import dataclasses

import experiment
import keras
from e3_balance_on_text import TextArm

from keras_moe import layers, models
from keras_moe.commands import compiling
from keras_moe.optimizers import FactoredAdam, WarmupInverseSquareRoot


@dataclasses.dataclass(frozen=True)
class RouterArm(TextArm):
    """The language model of E3, by one of two gates.

    Attributes:
        gate: `"paper"`, noisy with both losses, or `"loss_free"`.
        bias_update_rate: Of the second.
        k: Experts of a token.
    """

    gate: str = "loss_free"
    bias_update_rate: float = 0.01
    k: int = 4

    def shortened(self):
        return dataclasses.replace(super().shortened(), k=2)

    def middle(self):
        """The mixture; as that of `train-lm` but for the gate."""
        gate, weight = layers.NoisyTopKGating(self.k), self.loss_weight
        if self.gate == "loss_free":
            rate = self.bias_update_rate
            gate, weight = layers.LossFreeGating(self.k, bias_update_rate=rate), None
        return layers.MoE(
            layers.FeedForwardExperts(self.num_experts, 2 * self.units),
            gate,
            importance_loss_weight=weight,
            load_loss_weight=weight,
            activation="sigmoid",
            name="moe",
        )

    def build(self, vocabulary_size):
        model = models.MoELanguageModel(
            vocabulary_size,
            self.units,
            middle=self.middle(),
            dropout=0.3,
            stateful=True,
        )
        model.build((32, 32))
        schedule = WarmupInverseSquareRoot(0.004, 200)
        compiling.compile_model(
            model, FactoredAdam(schedule, factored=[], global_clipnorm=1.0)
        )
        return model


def plan(seed, without):
    rate = 0.0 if without == "bias" else RouterArm.bias_update_rate
    return {
        "bias": RouterArm(bias_update_rate=rate, seed=seed),
        "losses 0.1": RouterArm(gate="paper", seed=seed),
        "bias that stays 0": RouterArm(bias_update_rate=0.0, seed=seed),
    }


def check(found):
    bias, losses, fixed = (
        found[name] for name in ("bias", "losses 0.1", "bias that stays 0")
    )
    load, uneven = bias["pass_max_over_mean"], fixed["pass_max_over_mean"]
    pair = bias["perplexity"], losses["perplexity"]
    return {
        f"bias, max/mean {load:.2f} <= 1.3": load <= 1.3,
        f"perplexity {pair[0]:.1f} <= {pair[1]:.1f} with the losses": pair[0]
        <= pair[1],
        f"bias that stays 0, max/mean {uneven:.2f} > 1.3": uneven > 1.3,
    }


if __name__ == "__main__":
    keras.utils.disable_interactive_logging()
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        columns={
            "perplexity": ".1f",
            "pass_load_cv": ".3f",
            "pass_max_over_mean": ".2f",
            "hard_load_cv": ".3f",
            "hard_max_over_mean": ".2f",
            "count_cv": ".3f",
            "count_max_over_mean": ".2f",
        },
        causes={"bias": "the bias is not updated"},
    )
