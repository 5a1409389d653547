"""Time of a training step with the sampled and with the full softmax.

    python examples/benchmarks/sampled_softmax_benchmark.py

Steps of the language model with a mixture, compiled and run by `train_on_batch` as `fit`
does, with Adam. The two sides alternate in one run. `--quick` is a tiny run that only
shows that everything works.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from alternating import compare

import keras_moe


def make_step(num_sampled, a):
    """A function that runs one training step."""
    keras.utils.set_random_seed(0)
    model = keras_moe.models.MoELanguageModel(
        a.vocabulary_size,
        a.units,
        middle=keras_moe.models.middle_layers(
            "moe", units=a.units, hidden_units=2 * a.units, num_experts=16
        ),
        num_sampled=num_sampled,
    )
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    # Words as frequent as in text: rank r with probability of about 1 / r.
    rng = np.random.default_rng(0)
    tokens = np.exp(
        rng.uniform(0, np.log(a.vocabulary_size), (a.batch_size, a.time + 1))
    )
    tokens = tokens.astype("int32").clip(1, a.vocabulary_size - 1)
    return lambda: model.train_on_batch(tokens[:, :-1], tokens[:, 1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--vocabulary-size", type=int, default=100_000, help="number of words"
    )
    parser.add_argument("--units", type=int, default=128, help="width of the model")
    parser.add_argument(
        "--num-sampled", type=int, default=8192, help="candidates of the softmax"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="rows of a batch")
    parser.add_argument("--time", type=int, default=32, help="time steps of a batch")
    parser.add_argument("--steps", type=int, default=5, help="steps to measure")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.vocabulary_size, a.units, a.num_sampled = 500, 16, 50
        a.batch_size, a.steps = 8, 2
    print(
        f"{a.vocabulary_size:,} words, {a.units} units, {a.batch_size} x {a.time} "
        f"tokens, {a.num_sampled:,} candidates\n\n| softmax | median step (s) |\n|---|---|",
        flush=True,
    )
    (full, sampled), (_, ratio, _) = compare(
        make_step(None, a), make_step(a.num_sampled, a), (), a.steps
    )
    print(
        f"| sampled | {sampled:.3f} |\n| full | {full:.3f} |\n\n"
        f"The full softmax takes {ratio:.1f} times as long."
    )


if __name__ == "__main__":
    main()
