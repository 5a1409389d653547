"""E5: the more data, the more a larger mixture gains (figure 3).

    python examples/paper/e5_data_size.py

4 and 64 experts after 400 and after 1,500 steps of fresh data; with `--more`, the same
1,500 steps over only 300 batches (19,200 sequences), five times over.

Check: the 64 experts' gain in perplexity over 4 experts, as a fraction, is more than 8
percentage points larger after the longer training.
"""

import experiment
from arms import Arm

SHORT, LONG = 400, 1500


def plan(seed, without):
    long = SHORT if without == "data" else LONG
    return {
        f"MoE-{n}, {title} steps": Arm(num_experts=n, steps=steps, seed=seed)
        for title, steps in ((SHORT, SHORT), (LONG, long))
        for n in (4, 64)
    }


def more(seed):
    return {
        f"MoE-{n}, 300 batches": Arm(num_experts=n, batches=300, seed=seed)
        for n in (4, 64)
    }


def check(found):
    gains = {}
    for steps in (SHORT, LONG):
        few, many = (found[f"MoE-{n}, {steps} steps"]["perplexity"] for n in (4, 64))
        gains[steps] = 1 - many / few
    more = gains[LONG] - gains[SHORT]
    return {
        f"gain {gains[SHORT]:.1%} after {SHORT} steps, {gains[LONG]:.1%} after {LONG}: "
        f"{100 * more:.1f} points > 8": more > 0.08
    }


if __name__ == "__main__":
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        more=more,
        columns={"perplexity": ".3f", "max_over_mean": ".2f"},
        causes={"data": f"the long training has {SHORT} steps, too"},
    )
