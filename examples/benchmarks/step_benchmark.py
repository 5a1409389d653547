"""The training step of a language model with a mixture against one with a dense layer.

    python examples/benchmarks/step_benchmark.py

Embedding, LSTM, mixture or dense layer of equal operations, LSTM, softmax: the model of
`python -m keras_moe train-lm`, with Adam, by `train_on_batch`. The two sides alternate in
one run; a ratio above 1 means the mixture is faster. The limit is the longer of the time of
the dense side and of what the memory takes for the experts' weights, their gradients and
Adam (`bandwidth.py`). `--quick` is a tiny run that only shows that everything works.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import bandwidth
import keras
import numpy as np
from alternating import compare
from step_arguments import add_sizes

from keras_moe import models


def make_model(kind, a):
    middle = models.middle_layers(
        kind, units=a.units, hidden_units=a.hidden_units, num_experts=a.experts
    )
    model = models.MoELanguageModel(a.vocabulary, a.units, middle=middle)
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_sizes(parser)
    parser.add_argument(
        "--pairs", type=int, default=11, help="pairs of alternating measurements"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.units, a.hidden_units, a.vocabulary, a.pairs = 4, 8, 8, 50, 2
    keras.utils.set_random_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    tokens = rng.integers(3, a.vocabulary, (2, a.batch, a.time)).astype("int32")
    sides = []
    for kind in ("moe_1_wide", "moe"):
        model = make_model(kind, a)
        sides.append(lambda x, y, model=model: np.asarray(model.train_on_batch(x, y)))
    memory = bandwidth.measure(quick=a.quick)
    print(
        f"{a.units} units, {a.hidden_units} hidden units, vocabulary {a.vocabulary}, "
        f"{a.batch} x {a.time} tokens, {a.pairs} pairs\n{memory}\n\n"
        "| experts | dense (ms) | mixture (ms) | dense / mixture | quartiles |"
        + bandwidth.HEADER.format("mixture")
        + "\n|---|---|---|---|---|"
        + bandwidth.LINES
    )
    (dense_s, mixture_s), (low, middle, high) = compare(*sides, tuple(tokens), a.pairs)
    num_bytes = bandwidth.weight_bytes(a.experts, a.units, a.hidden_units)
    least = memory.least_seconds("training", num_bytes, "adam")
    limit = bandwidth.cells(mixture_s, dense_s, least)
    print(
        f"| {a.experts} | {dense_s * 1e3:.1f} | {mixture_s * 1e3:.1f} | {middle:.2f} "
        f"| {low:.2f} - {high:.2f} |{limit}"
    )


if __name__ == "__main__":
    main()
