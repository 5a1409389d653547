"""E6: FactoredAdam (appendix D) against Adam for the weights of experts.

    python examples/paper/e6_factored_adam.py

The mixture of 64 experts with `keras.optimizers.Adam`, and with `FactoredAdam`, which
keeps rows and columns of the second moment for the experts and no first moment.

Checks: perplexity at most 5 % above Adam's, state for the experts below 10 % of Adam's.
"""

import experiment
from arms import Arm


def plan(seed, without):
    optimizer = {"factors": "adam", "updates": "experts_fixed"}.get(without, "factored")
    return {
        "Adam": Arm(seed=seed),
        "FactoredAdam": Arm(optimizer=optimizer, seed=seed),
    }


def check(found):
    adam, factored = found["Adam"], found["FactoredAdam"]
    ratio = factored["perplexity"] / adam["perplexity"]
    state = factored["expert_state"] / adam["expert_state"]
    return {
        f"perplexity, factored / Adam: {ratio:.3f} < 1.05": ratio < 1.05,
        f"state, factored / Adam: {state:.1%} < 10 %": state < 0.1,
    }


if __name__ == "__main__":
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        columns={"perplexity": ".3f", "expert_state": ",", "max_over_mean": ".2f"},
        causes={
            "factors": "the second arm is trained with Adam, too",
            "updates": "the second arm leaves the experts' weights as they start",
        },
    )
