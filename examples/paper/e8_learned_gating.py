"""E8: does it matter that the gate learns?

    python examples/paper/e8_learned_gating.py

The mixture of 64 experts against one whose gate keeps its random weights, without noise
and losses. There are 32 features of pure noise in what the mixture is given, seen by gate
and experts: a random gate follows the noise. Embeddings start at standard deviation 1. With
`--more`, all three with those of Keras ("quiet"), which start at 0.03, a hundredth of the
noise: 1,500 steps are too few for the gate to find the topic in it. And both gates on the
plain task.

There a random gate is easily mistaken for no learning: what the gate sees is learned, and
so it can be led. The row "random, blocked" takes that away: no gradient goes through it.

Checks: with distractors, the trained gate has less than 0.7 times the perplexity of the
random one, and 64 experts less than 0.8 times that of 4; the trained gate's choice tells
the topic: mutual information of the expert with the largest gate and the topic above
that of shuffled topics by more than 0.1 of the topic's entropy, and above that of the
random gate (table 9 in one number).
"""

import experiment
from arms import Arm, LoudArm

DISTRACTORS = 32
FROZEN = {"gate": "frozen", "importance_weight": 0.0, "load_weight": 0.0}


def plan(seed, without):
    trained = FROZEN if without == "learning" else {}
    hard = {"distractors": DISTRACTORS, "seed": seed}
    return {
        "trained, 64, distractors": LoudArm(**trained, **hard),
        "random, 64, distractors": LoudArm(**FROZEN, **hard),
        "trained, 4, distractors": LoudArm(num_experts=4, **hard),
    }


def more(seed):
    hard = {"distractors": DISTRACTORS, "seed": seed}
    return {
        "trained, 64": Arm(seed=seed),
        "random, 64": Arm(**FROZEN, seed=seed),
        "random, blocked, 64": Arm(**{**FROZEN, "gate": "blocked"}, seed=seed),
        "trained, 64, distractors, quiet": Arm(**hard),
        "random, 64, distractors, quiet": Arm(**FROZEN, **hard),
        "trained, 4, distractors, quiet": Arm(num_experts=4, **hard),
    }


def check(found):
    trained, random, few = (
        found[f"{title}, distractors"]
        for title in ("trained, 64", "random, 64", "trained, 4")
    )
    gate = trained["perplexity"] / random["perplexity"]
    size = trained["perplexity"] / few["perplexity"]
    tells, null = trained["information"], trained["information_shuffled"]
    return {
        f"perplexity, trained / random gate: {gate:.3f} < 0.7": gate < 0.7,
        f"perplexity, 64 / 4 experts: {size:.3f} < 0.8": size < 0.8,
        f"information {tells:.3f} > shuffled {null:.3f} + 0.1": tells > null + 0.1,
        f"information {tells:.3f} > random gate {random['information']:.3f} + 0.1": (
            tells > random["information"] + 0.1
        ),
    }


if __name__ == "__main__":
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        more=more,
        columns={
            "perplexity": ".3f",
            "information": ".3f",
            "information_shuffled": ".3f",
            "hard_load_cv": ".3f",
            "hard_max_over_mean": ".2f",
        },
        causes={"learning": "the gate of the first arm keeps its random weights, too"},
    )
