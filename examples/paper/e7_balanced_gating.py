"""Strictly balanced gating (appendix F) against noisy top-k gating.

    python examples/paper/e7_balanced_gating.py

Trains the model of `topic_bigram.py` with 64 experts twice: with `BalancedGating`, which
gives every expert exactly the same number of tokens in training and selects by learned
thresholds at inference, and with `NoisyTopKGating` and balancing losses. Both spend the
same operations in training.

Checks: perplexity with thresholds within 10 % of that of noisy top-k; experts of a token
at inference within 15 % of k on average; with all thresholds halved that fails, so the
thresholds are what does it. `--quick` is a short run that only shows that all works.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from topic_bigram import build_model, evaluate, make_moe, make_task, train

from keras_moe.layers import BalancedGating, NoisyTopKGating


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="short, for a test")
    arguments = parser.parse_args()
    steps = 20 if arguments.quick else arguments.steps
    evaluation_steps = 5 if arguments.quick else 50
    task = make_task(arguments.seed)
    print(f"Floor of the perplexity: {task.floor_perplexity:.2f}", flush=True)

    reports, models = {}, {}
    for name, gating, loss_weights in (
        ("noisy top-k", NoisyTopKGating(k=arguments.k), (0.1, 0.1)),
        ("balanced", BalancedGating(k=arguments.k), (0.0, 0.0)),
    ):
        keras.utils.set_random_seed(arguments.seed)
        start = time.perf_counter()
        models[name] = build_model(make_moe(gating, arguments.experts, loss_weights))
        reports[name] = train(
            models[name],
            task,
            steps=steps,
            seed=arguments.seed,
            evaluation_steps=evaluation_steps,
        )
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        reports[name] |= experts_per_token(models[name], task, evaluation_steps)

    model = models["balanced"]
    trained = model.get_layer("moe").gating.thresholds
    learned = trained.numpy()
    trained.assign(0.5 * learned)
    name = "balanced, thresholds halved"
    reports[name] = evaluate(model, task, steps=evaluation_steps)
    reports[name] |= experts_per_token(model, task, evaluation_steps)
    trained.assign(learned)

    columns = list(reports["balanced"])
    print("\n| gate | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, report in reports.items():
        figures = " | ".join(f"{report[column]:.3f}" for column in columns)
        print(f"| {name} | {figures} |")

    if not arguments.quick:
        check(reports, arguments.k)


def experts_per_token(model, task, batches):
    """Mean number of experts of a token at inference, and the share without one."""
    moe = model.get_layer("moe")
    inputs_of_moe = keras.Model(model.inputs, moe.input)
    numbers = []
    for (topics, tokens), _ in task.dataset(batches, seed=777_777):
        plan = moe.route(inputs_of_moe([topics, tokens])).plan
        numbers.append(
            np.bincount(plan.token_indices, minlength=tokens.shape.num_elements())
        )
    return {
        "experts_per_token": float(np.mean(numbers)),
        "without_expert": float(np.mean(np.equal(numbers, 0))),
    }


def check(reports, k):
    balanced, noisy = reports["balanced"], reports["noisy top-k"]
    halved = reports["balanced, thresholds halved"]
    ratio = balanced["perplexity"] / noisy["perplexity"]
    checks = {
        f"perplexity ratio {ratio:.3f} within 10 %": abs(ratio - 1) < 0.1,
        "experts per token within 15 % of k": _near(balanced, k),
        "halved thresholds fail that": not _near(halved, k),
    }
    print()
    for text, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED'}: {text}")
    if not all(checks.values()):
        raise SystemExit(1)


def _near(report, k):
    return abs(report["experts_per_token"] / k - 1) < 0.15


if __name__ == "__main__":
    main()
