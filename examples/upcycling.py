"""A dense language model made sparse, and both trained on for as long.

    python examples/upcycling.py --minutes 2 --seeds 1 2 3

Trains a small transformer on the embedded corpus for some minutes, upcycles it
(`keras_moe.upcycle`: the feed-forward network of every block becomes a mixture of its
copies), shows that the outputs are the same, and then trains the dense and the sparse
model on, in turns, each for as many minutes again (of the processor), both with a new
Adam whose learning rate falls to 0 in this time. Printed are perplexities of the
validation text; the sparse model does fewer steps. The corpus is small (354,008 tokens):
after some ten passes both models overfit, and perplexities rise. `--quick` only shows
that everything works.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_moe

TURN = 20  # steps of one model before it is the other's turn


def build(vocabulary_size, a):
    """Tokens `(batch, length)` to logits; blocks of attention and feed-forward."""
    tokens = keras.Input((a.length,), dtype="int32", name="tokens")
    places = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    hidden = keras.layers.Embedding(vocabulary_size, a.units)(tokens)
    hidden = hidden + keras.layers.Embedding(a.length, a.units)(places)
    for i in range(a.blocks):
        inner = keras.layers.LayerNormalization()(hidden)
        attention = keras.layers.MultiHeadAttention(4, a.units // 4)
        inner = attention(inner, inner, use_causal_mask=True)
        hidden = hidden + keras.layers.Dropout(0.1)(inner)
        inner = keras.layers.LayerNormalization()(hidden)
        inner = keras.layers.Dense(a.hidden_units, "gelu", name=f"block_{i}")(inner)
        inner = keras.layers.Dense(a.units)(inner)
        hidden = hidden + keras.layers.Dropout(0.1)(inner)
    hidden = keras.layers.LayerNormalization()(hidden)
    return keras.Model(tokens, keras.layers.Dense(vocabulary_size)(hidden))


class Run:
    """A model in training: its batches, its steps, its seconds.

    Its learning rate falls in a line to 0 at the end of its time if `falls`.
    """

    def __init__(self, model, text, a, seed, falls=True):
        model.compile(
            keras.optimizers.Adam(a.learning_rate),
            keras_moe.losses.TokenCrossentropy(),
            jit_compile=a.jit_compile,
        )
        self.model, self.text, self.a, self.falls = model, text, a, falls
        self.rng = np.random.default_rng(seed)
        self.steps, self.seconds = 0, 0.0
        self.train(1)  # traces the step
        self.seconds = 0.0

    def train(self, steps):
        """Steps on windows from anywhere in the text."""
        a, begin = self.a, time.process_time()
        if self.falls:
            left = max(0.0, 1 - self.seconds / (60 * a.minutes))
            self.model.optimizer.learning_rate = a.learning_rate * left
        for _ in range(steps):
            starts = self.rng.integers(0, len(self.text) - a.length, a.batch_size)
            windows = self.text[starts[:, np.newaxis] + np.arange(a.length + 1)]
            self.model.train_on_batch(windows[:, :-1], windows[:, 1:])
        self.steps += steps
        self.seconds += time.process_time() - begin


def make_gate(a):
    """A gate whose gates sum to 1, which upcycling needs."""
    drawn = {"gate_initializer": keras.initializers.RandomNormal(0.0, 0.02)}
    kinds = {
        "noisy_top_k": keras_moe.layers.NoisyTopKGating,
        "top_k": keras_moe.layers.TopKGating,
        "loss_free": keras_moe.layers.LossFreeGating,
    }
    return kinds[a.gating](a.k, **drawn)


def perplexity(model, text, a):
    """Of all whole windows of a text, or of its first tokens."""
    rows = min(len(text) - 1, a.valid_tokens) // a.length
    inputs = text[: rows * a.length].reshape(rows, a.length)
    targets = text[1 : rows * a.length + 1].reshape(rows, a.length)
    logs = model.evaluate(inputs, targets, verbose=0, return_dict=True)
    return float(np.exp(logs["loss"]))


def run(seed, corpus, a):
    """The line of the table for one seed."""
    keras.utils.set_random_seed(seed)
    dense = build(len(corpus.vocabulary), a)
    first = Run(dense, corpus.train, a, seed, falls=False)
    while first.seconds < 60 * a.first_minutes:
        first.train(TURN)
    before = perplexity(dense, corpus.valid, a)
    sparse = keras_moe.upcycle(
        dense, num_experts=a.num_experts, gating=lambda: make_gate(a)
    )
    tokens = corpus.valid[: 4 * a.length].reshape(4, a.length)
    apart = float(np.max(np.abs(sparse(tokens) - dense(tokens))))
    assert apart < 1e-4, apart
    print(
        f"seed {seed}: {first.steps} steps, perplexity {before:.2f}; logits of the "
        f"upcycled model differ by {apart:.1e} at most",
        flush=True,
    )

    runs = {"dense": Run(dense, corpus.train, a, seed + 1000)}
    runs["sparse"] = Run(sparse, corpus.train, a, seed + 1000)
    while any(each.seconds < 60 * a.minutes for each in runs.values()):
        for each in runs.values():
            if each.seconds < 60 * a.minutes:
                each.train(TURN)
    after = {name: perplexity(r.model, corpus.valid, a) for name, r in runs.items()}
    steps = {name: each.steps for name, each in runs.items()}
    return (
        f"| {seed} | {before:.2f} | {after['dense']:.2f} ({steps['dense']}) "
        f"| {after['sparse']:.2f} ({steps['sparse']}) |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="of training each model on"
    )
    parser.add_argument(
        "--first-minutes", type=float, help="of the first training; default: as many"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=2, help="experts for each token")
    parser.add_argument(
        "--gating",
        choices=["noisy_top_k", "top_k", "loss_free"],
        default="noisy_top_k",
    )
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--hidden-units", type=int, default=512)
    parser.add_argument("--length", type=int, default=64, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--data-dir", help="folder of a text; default: the embedded one"
    )
    parser.add_argument("--vocabulary-size", type=int, help="words, at most")
    parser.add_argument("--valid-tokens", type=int, default=200_000, help="at most")
    parser.add_argument("--jit-compile", action="store_true", help="by XLA")
    parser.add_argument("--min-count", type=int, default=5, help="of a word")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.minutes, a.blocks, a.units, a.hidden_units = 0.001, 1, 8, 16
        a.length, a.min_count, a.num_experts = 16, 200, 4
    if a.first_minutes is None or a.quick:
        a.first_minutes = a.minutes
    known = {} if a.data_dir is None else {"tokenizer": "words"}
    corpus = keras_moe.data.load_text_corpus(
        a.data_dir,
        min_count=a.min_count,
        vocabulary_size=a.vocabulary_size,
        **known,
    )
    if a.quick:
        corpus = corpus.__class__(
            corpus.name,
            corpus.tokenizer,
            corpus.vocabulary,
            corpus.train[:2000],
            corpus.valid[:500],
            corpus.test[:500],
        )
    lines = [run(seed, corpus, a) for seed in a.seeds]
    print(
        f"\nPerplexity of the validation text after {a.first_minutes} minutes, upcycled "
        f"into {a.num_experts} experts with k={a.k}, and after {a.minutes} more (steps):\n"
    )
    print("| seed | at the start | dense | sparse |")
    print("|---|---|---|---|")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
