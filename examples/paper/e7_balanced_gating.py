"""E7: strictly balanced gating (appendix F) against noisy top-k gating.

    python examples/paper/e7_balanced_gating.py

The mixture of 64 experts with `BalancedGating`, which gives every expert exactly the
same number of tokens in training and selects by learned thresholds at inference, and
with `NoisyTopKGating` and balancing losses. Both spend the same operations in training.

Checks: in every batch of 1,024 tokens of training each expert has the same number of
them, 4 * 1024 / 64; perplexity with thresholds within 10 % of that of noisy top-k; experts
of a token at inference within 15 % of k on average. With all thresholds halved the last
must fail, which is a check too: thresholds are what does it.
"""

import experiment
from arms import Arm, K


def plan(seed, without):
    balanced = Arm(
        "balanced",
        importance_weight=0.0,
        load_weight=0.0,
        seed=seed,
    )
    noisy = Arm(seed=seed)
    return {
        "noisy top-k": noisy,
        "balanced": noisy if without == "balance" else balanced,
    }


def check(found):
    noisy, balanced = found["noisy top-k"], found["balanced"]
    ratio = balanced["perplexity"] / noisy["perplexity"]
    least, most = balanced["least_count"], balanced["most_count"]
    per_token = balanced["experts_per_token"]
    halved = balanced.get("halved_experts_per_token", per_token)
    return {
        f"tokens of an expert in training: {least} to {most}": least == most,
        f"perplexity, balanced / noisy: {ratio:.3f} within 10 %": abs(ratio - 1) < 0.1,
        f"experts of a token at inference: {per_token:.2f} within 15 % of {K}": (
            _near(per_token)
        ),
        f"with halved thresholds: {halved:.2f}, not within 15 %": not _near(halved),
    }


def _near(per_token):
    return abs(per_token / K - 1) < 0.15


if __name__ == "__main__":
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        columns={
            "perplexity": ".3f",
            "least_count": "",
            "most_count": "",
            "experts_per_token": ".3f",
            "without_expert": ".4f",
            "halved_perplexity": ".3f",
            "halved_experts_per_token": ".3f",
        },
        causes={"balance": "the second arm has the noisy top-k gate, too"},
    )
