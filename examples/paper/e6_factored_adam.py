"""FactoredAdam (appendix D) against Adam for the weights of experts.

    python examples/paper/e6_factored_adam.py

Trains the model of `topic_bigram.py` with 64 experts with `keras.optimizers.Adam`, and
with `FactoredAdam`, which keeps rows and columns of the second moment for the experts and
no first moment. Checks: perplexity within 5 % of Adam's, state for the experts below 10 %
of Adam's. `--quick` is a short run that only shows that all works.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from topic_bigram import build_model, make_moe, make_task, train

from keras_moe.layers import NoisyTopKGating
from keras_moe.optimizers import FactoredAdam


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="short, for a test")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.experts = 20, 8

    print("| seed | optimizer | perplexity | state of the experts | seconds |")
    print("|---|---|---|---|---|", flush=True)
    passed = True
    for seed in arguments.seeds:
        found = {}
        for optimizer in (keras.optimizers.Adam, FactoredAdam):
            start = time.perf_counter()
            perplexity, state = run(optimizer, seed, arguments)
            found[optimizer] = (perplexity, state)
            print(
                f"| {seed} | {optimizer.__name__} | {perplexity:.3f} | {state:,} | "
                f"{time.perf_counter() - start:.0f} |",
                flush=True,
            )
        adam, factored = found[keras.optimizers.Adam], found[FactoredAdam]
        passed &= factored[0] < 1.05 * adam[0] and factored[1] < 0.1 * adam[1]
    if not arguments.quick:
        print(f"\n{'ok' if passed else 'FAILED'}: within 5 %, state below 10 %")
        if not passed:
            raise SystemExit(1)


def run(optimizer, seed, arguments):
    """Perplexity, and how many numbers the optimizer keeps for the experts."""
    keras.utils.set_random_seed(seed)
    model = build_model(make_moe(NoisyTopKGating(k=4), arguments.experts))
    report = train(
        model,
        make_task(seed),
        steps=arguments.steps,
        seed=seed,
        evaluation_steps=5 if arguments.quick else 50,
        optimizer=optimizer,
    )
    kernels = model.get_layer("moe").experts.kernels
    if isinstance(model.optimizer, FactoredAdam):
        slots = [s for kernel in kernels for s in model.optimizer.slots_of(kernel)]
    else:  # a slot is named after its variable
        names = tuple(kernel.path.replace("/", "_") for kernel in kernels)
        slots = [v for v in model.optimizer.variables if v.name.startswith(names)]
    return report["perplexity"], sum(slot.shape.num_elements() for slot in slots)


if __name__ == "__main__":
    main()
