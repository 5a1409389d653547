"""Time of a training step with the sampled and with the full softmax.

    python examples/benchmarks/sampled_softmax_benchmark.py
    python examples/benchmarks/sampled_softmax_benchmark.py --data-dir FOLDER

Steps of the language model with a mixture, compiled and run by `train_on_batch` as `fit`
does: the full softmax with Keras' Adam, the sampled one with Adam on the rows that a step
reads. The two sides alternate in one run; processor time is given too, since other work
on the machine does not change it. With a folder of text (as for `train-lm`) the batches
are its text, and the perplexity of the sampled side before and after these and
`--more-steps` further steps is that of the full softmax on validation text. `--quick` is
a tiny run that only shows that everything works.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from alternating import compare

import keras_moe


def make_model(num_sampled, a):
    """The compiled model."""
    keras.utils.set_random_seed(0)
    model = keras_moe.models.MoELanguageModel(
        a.vocabulary_size,
        a.units,
        middle=keras_moe.models.middle_layers(
            "moe", units=a.units, hidden_units=2 * a.units, num_experts=16
        ),
        num_sampled=num_sampled,
    )
    optimizer = keras.optimizers.Adam(1e-3)
    if num_sampled is not None:
        optimizer = keras_moe.optimizers.FactoredAdam(
            1e-3, factored=[], untouched_rows="keep"
        )
    model.compile(
        optimizer,
        keras_moe.losses.TokenCrossentropy(),
        weighted_metrics=[keras_moe.telemetry.Perplexity()],
    )
    return model


def batches_of(a, corpus):
    """Batches without end."""
    if corpus is not None:
        yield from corpus.dataset("train", a.batch_size, a.sequence_length).repeat()
    # Words as frequent as in text: rank r with probability of about 1 / r.
    rng = np.random.default_rng(0)
    while True:
        shape = (a.batch_size, a.sequence_length + 1)
        tokens = np.exp(rng.uniform(0, np.log(a.vocabulary_size), shape))
        tokens = tokens.astype("int32").clip(1, a.vocabulary_size - 1)
        yield tokens[:, :-1], tokens[:, 1:]


def make_step(model, batches, times):
    """A function that runs one training step and notes its processor time."""

    def step():
        batch = next(batches)
        start = time.process_time()
        model.train_on_batch(*batch)
        times.append(time.process_time() - start)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary-size", type=int, default=100_000)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--num-sampled", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--data-dir", help="folder with train, valid and test text")
    parser.add_argument("--more-steps", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.vocabulary_size, a.units, a.num_sampled = 500, 16, 50
        a.batch_size, a.steps = 8, 2
    corpus = None
    if a.data_dir:
        corpus = keras_moe.data.load_text_corpus(
            a.data_dir, tokenizer="words", vocabulary_size=a.vocabulary_size
        )
        a.vocabulary_size = len(corpus.vocabulary)
    print(
        f"{a.vocabulary_size:,} words, {a.units} units, {a.batch_size} x {a.sequence_length} "
        f"tokens, {a.num_sampled:,} candidates\n\n"
        "| softmax | median step (s) | processor (s) |\n|---|---|---|",
        flush=True,
    )
    sides, times = (make_model(None, a), make_model(a.num_sampled, a)), ([], [])

    def perplexity():
        data = corpus.dataset("valid", a.batch_size, a.sequence_length).take(4)
        return sides[1].evaluate(data, verbose=0, return_dict=True)["perplexity"]

    before = None if corpus is None else perplexity()
    steps = [
        make_step(model, batches_of(a, corpus), noted)
        for model, noted in zip(sides, times, strict=True)
    ]
    (full, sampled), (_, ratio, _) = compare(*steps, (), a.steps)
    processor = [float(np.median(noted[1:])) for noted in times]
    print(
        f"| sampled | {sampled:.3f} | {processor[1]:.3f} |\n"
        f"| full | {full:.3f} | {processor[0]:.3f} |\n\n"
        f"The full softmax takes {ratio:.1f} times as long, "
        f"{processor[0] / processor[1]:.1f} times the processor time.",
        flush=True,
    )
    if corpus is not None:
        for _ in range(a.more_steps):
            steps[1]()
        print(
            f"Validation perplexity by the full softmax: {before:,.0f} before, "
            f"{perplexity():,.0f} after {len(times[1])} sampled steps."
        )


if __name__ == "__main__":
    main()
