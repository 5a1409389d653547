"""E3: the balancing losses on real text.

    python examples/paper/e3_balance_on_text.py --seeds 0

The language model of `python -m keras_moe train-lm` with 64 experts on the embedded
corpus, two passes of 345 steps, with both losses at 0.1 and without losses.

Checks, on smooth load and on true counts in training mode, and on true counts of the test
text without noise: without losses the busiest expert has more than 5 times the mean load
and the coefficient of variation is above 1.5; with them, below 2 and below 0.4. With
`--more` also a single pass, after which the routing without noise is not balanced yet.
Perplexities are shown and not compared: two short passes say little about them.
"""

import dataclasses

import experiment
from measures import balance_in_training

from keras_moe import data
from keras_moe.commands import train_lm
from keras_moe.commands.options import TrainLMOptions

PASS = 345  # steps


@dataclasses.dataclass(frozen=True)
class TextArm:
    """A language model on the embedded corpus.

    Attributes:
        loss_weight: Of the importance and the load loss.
        num_experts: Int.
        steps: Batches of training; after 345 the text begins again.
        seed: Of weights, dropout and noise.
        evaluation_steps: Batches of the test text; None takes all.
        units: Width of the model.
    """

    loss_weight: float = 0.1
    num_experts: int = 64
    steps: int = 2 * PASS
    seed: int = 0
    evaluation_steps: int | None = None
    units: int = 64

    def shortened(self):
        return dataclasses.replace(
            self, num_experts=8, steps=3, evaluation_steps=2, units=8
        )

    def build(self, vocabulary_size):
        """The compiled model."""
        options = TrainLMOptions(
            num_experts=self.num_experts,
            units=self.units,
            hidden_units=2 * self.units,
            loss_weight=self.loss_weight,
        )
        return train_lm.build_model(options, vocabulary_size, "moe", self.steps)

    def run(self):
        experiment.start_afresh(self.seed)
        corpus = data.load_text_corpus(min_count=2)
        model = self.build(len(corpus.vocabulary))
        shape = TrainLMOptions.batch_size, TrainLMOptions.sequence_length
        passes = -(-self.steps // PASS)
        data_of_pass = corpus.dataset("train", *shape).take(self.steps // passes)
        fit = model.fit(data_of_pass, epochs=passes, shuffle=False, verbose=0)
        # Few rows, so that little text begins from zero state.
        test = corpus.dataset("test", 8, TrainLMOptions.sequence_length)
        test = test.take(self.evaluation_steps or -1)
        logs = model.evaluate(test, verbose=0, return_dict=True)
        results = {
            "perplexity": logs["perplexity"],
            "pass_load_cv": fit.history["moe_load_cv"][-1],
            "pass_max_over_mean": fit.history["moe_max_over_mean_load"][-1],
            "hard_load_cv": logs["moe_load_cv"],
            "hard_max_over_mean": logs["moe_max_over_mean_load"],
        }
        model.reset_state()
        batches = corpus.dataset("train", *shape).take(20)
        return results | balance_in_training(model, (tokens for tokens, *_ in batches))


def plan(seed, without):
    return {
        "losses 0.1": TextArm(0.0 if without == "losses" else 0.1, seed=seed),
        "no losses": TextArm(0.0, seed=seed),
    }


def more(seed):
    return {
        "losses 0.1, one pass": TextArm(steps=PASS, seed=seed),
        "no losses, one pass": TextArm(0.0, steps=PASS, seed=seed),
    }


def check(found):
    checks = {}
    for name, largest, variation in (
        ("smooth load", "max_over_mean", "load_cv"),
        ("true counts", "count_max_over_mean", "count_cv"),
        ("true counts without noise", "hard_max_over_mean", "hard_load_cv"),
    ):
        none, both = (
            (result[largest], result[variation])
            for result in (found["no losses"], found["losses 0.1"])
        )
        checks |= {
            f"{name}: no losses, max/mean {none[0]:.2f} > 5": none[0] > 5,
            f"{name}: no losses, CV {none[1]:.2f} > 1.5": none[1] > 1.5,
            f"{name}: losses, max/mean {both[0]:.2f} < 2": both[0] < 2,
            f"{name}: losses, CV {both[1]:.2f} < 0.4": both[1] < 0.4,
        }
    return checks


if __name__ == "__main__":
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        more=more,
        columns={
            "perplexity": ".1f",
            "importance_cv": ".3f",
            "load_cv": ".3f",
            "max_over_mean": ".2f",
            "count_cv": ".3f",
            "count_max_over_mean": ".2f",
            "hard_load_cv": ".3f",
            "hard_max_over_mean": ".2f",
        },
        causes={"losses": "the weights are 0 in both arms"},
    )
