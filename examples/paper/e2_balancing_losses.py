"""E2: what the two balancing losses do (table 6).

    python examples/paper/e2_balancing_losses.py

The mixture of 64 experts of E1 with six pairs of weights of the importance and the load
loss. The seventh row, without losses and without noise, has no check.

Checks: without losses the perplexity is at least 8 % above every row of moderate weights
and the load varies more than 3 times as much as with 0.1 each; a greater weight means a
smaller largest load; each loss does most for what it measures.

The paper finds the weights (1, 1) as good as the others. The table shows whether that
holds here; it is not a check.
"""

import experiment
from arms import Arm

ROWS = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.2), (0.1, 0.1), (0.01, 0.01), (1.0, 1.0))
MODERATE = ROWS[1:5]


def title(weights):
    return "importance {:g}, load {:g}".format(*weights)


def plan(seed, without):
    arms = {}
    for row in ROWS:
        weights = (0.0, 0.0) if without == "losses" else row
        arms[title(row)] = Arm(
            importance_weight=weights[0], load_weight=weights[1], seed=seed
        )
    return arms


def more(seed):
    none = {"importance_weight": 0.0, "load_weight": 0.0}
    return {"importance 0, load 0, no noise": Arm(**none, gate="plain", seed=seed)}


def check(found):
    def of(row, key):
        return found[title(row)][key]

    none, both = ROWS[0], (0.1, 0.1)
    by_importance, by_load = (0.2, 0.0), (0.0, 0.2)
    worst = max(of(row, "perplexity") for row in MODERATE)
    harm = of(none, "perplexity") / worst
    load = of(none, "load_cv") / of(both, "load_cv")
    weights = ((0.01, 0.01), (0.1, 0.1), (1.0, 1.0))
    loads = [of(row, "max_over_mean") for row in weights]
    importance = [of(row, "importance_cv") for row in (by_importance, by_load)]
    cvs = [of(row, "load_cv") for row in (by_importance, by_load)]
    return {
        f"no losses / worst of moderate weights: {harm:.3f} >= 1.08": harm >= 1.08,
        f"CV of the load, none / 0.1 each: {load:.2f} > 3": load > 3,
        "max/mean load falls from 0.01 to 0.1 to 1: "
        + ", ".join(f"{value:.2f}" for value in loads): loads[0] > loads[1] > loads[2],
        "CV of the importance, importance loss {:.3f} < load loss {:.3f}".format(
            *importance
        ): importance[0] < importance[1],
        "CV of the load, importance loss {:.3f} > load loss {:.3f}".format(*cvs): (
            cvs[0] > cvs[1]
        ),
    }


def draw(axes, everything):
    rows = [title(row) for row in ROWS]
    for seed, found in everything.items():
        axes.plot(
            [found[row]["max_over_mean"] for row in rows],
            [found[row]["perplexity"] for row in rows],
            "o",
            label=f"seed {seed}",
        )
    first = everything[min(everything)]
    for row in rows:
        axes.annotate(
            row,
            (first[row]["max_over_mean"], first[row]["perplexity"]),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(
        xlabel="max/mean load in training",
        ylabel="perplexity",
        title="Weights of the losses, balance and perplexity",
    )
    axes.legend()


if __name__ == "__main__":
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        columns={
            "perplexity": ".3f",
            "importance_cv": ".3f",
            "load_cv": ".3f",
            "max_over_mean": ".2f",
            "hard_load_cv": ".3f",
            "hard_max_over_mean": ".2f",
        },
        causes={"losses": "both weights are 0 in every row"},
        more=more,
        draw=draw,
    )
