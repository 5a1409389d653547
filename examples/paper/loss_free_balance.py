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
from e3_balance_on_text import PASS
from measures import balance_in_training

from keras_moe import data, layers, models
from keras_moe.commands import runs
from keras_moe.optimizers import FactoredAdam, WarmupInverseSquareRoot


@dataclasses.dataclass(frozen=True)
class RouterArm:
    """A language model on the embedded corpus, by one of two gates.

    Attributes:
        gate: `"paper"`, noisy with both losses, or `"loss_free"`.
        bias_update_rate: Of the second.
        loss_weight: Of the first.
        num_experts: Int.
        k: Experts of a token.
        steps: Batches of training; after 345 the text begins again.
        seed: Of weights, dropout and noise.
        evaluation_steps: Batches of the test text; None takes all.
        units: Width of the model.
    """

    gate: str = "loss_free"
    bias_update_rate: float = 0.01
    loss_weight: float = 0.1
    num_experts: int = 64
    k: int = 4
    steps: int = 2 * PASS
    seed: int = 0
    evaluation_steps: int | None = None
    units: int = 64

    def shortened(self):
        return dataclasses.replace(
            self, num_experts=8, k=2, steps=3, evaluation_steps=2, units=8
        )

    def middle(self):
        """The mixture; as that of `train-lm` but for the gate."""
        gate, weight = layers.NoisyTopKGating(self.k), self.loss_weight
        if self.gate == "loss_free":
            gate, weight = (
                layers.LossFreeGating(self.k, bias_update_rate=self.bias_update_rate),
                None,
            )
        return layers.MoE(
            layers.FeedForwardExperts(self.num_experts, 2 * self.units),
            gate,
            importance_loss_weight=weight,
            load_loss_weight=weight,
            activation="sigmoid",
            name="moe",
        )

    def run(self):
        experiment.start_afresh(self.seed)
        corpus = data.load_text_corpus(min_count=2)
        model = models.MoELanguageModel(
            len(corpus.vocabulary),
            self.units,
            middle=self.middle(),
            dropout=0.3,
            stateful=True,
        )
        batch = 32, 32
        model.build(batch)
        schedule = WarmupInverseSquareRoot(0.004, 200)
        runs.compile_model(
            model, FactoredAdam(schedule, factored=[], global_clipnorm=1.0)
        )
        passes = -(-self.steps // PASS)
        stream = corpus.dataset("train", *batch).take(self.steps // passes)
        history = model.fit(stream, epochs=passes, shuffle=False, verbose=0).history
        test = corpus.dataset("test", 8, 32).take(self.evaluation_steps or -1)
        logs = model.evaluate(test, verbose=0, return_dict=True)
        results = {
            "perplexity": logs["perplexity"],
            "pass_load_cv": history["moe_load_cv"][-1],
            "pass_max_over_mean": history["moe_max_over_mean_load"][-1],
            "hard_load_cv": logs["moe_load_cv"],
            "hard_max_over_mean": logs["moe_max_over_mean_load"],
        }
        model.reset_state()
        batches = (tokens for tokens, *_ in corpus.dataset("train", *batch).take(20))
        return results | balance_in_training(model, batches)


def plan(seed, without):
    rate = 0.0 if without == "bias" else RouterArm.bias_update_rate
    return {
        "bias": RouterArm(bias_update_rate=rate, seed=seed),
        "losses 0.1": RouterArm("paper", seed=seed),
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
