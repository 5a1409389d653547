"""Time of the cross-entropy of tokens, of Keras' loss and of the package's.

    python examples/benchmarks/cross_entropy_benchmark.py

Rows of logits and their targets, for several vocabularies: the loss alone, and the loss
with its gradient for the logits. The two sides alternate in one run. `--quick` is a tiny
run that only shows that everything works.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
from alternating import compare

import keras_moe


def make_sides(loss):
    """`forward` and `training`, one number each."""

    @tf.function
    def forward(targets, logits):
        return loss(targets, logits)

    @tf.function
    def training(targets, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(targets, logits)
        return tf.reduce_sum(tape.gradient(value, logits)[:, 0])

    return {"loss": forward, "loss and gradient": training}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=[1000, 8000, 32000]
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.tokens, a.vocabularies, a.pairs = 16, [50], 2
    tf.config.threading.set_intra_op_parallelism_threads(a.threads)
    tf.config.threading.set_inter_op_parallelism_threads(a.threads)
    usual = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    sides = make_sides(usual), make_sides(keras_moe.losses.TokenCrossentropy())
    print("| vocabulary | | Keras, ms | here, ms | Keras / here (quartiles) |")
    print("|---|---|---|---|---|")
    for size in a.vocabularies:
        logits = tf.random.normal((a.tokens, size))
        targets = tf.random.uniform((a.tokens,), 0, size, tf.int32)
        for name in sides[0]:
            times, (low, median, high) = compare(
                sides[0][name], sides[1][name], (targets, logits), a.pairs
            )
            print(
                f"| {size} | {name} | {1e3 * times[0]:.1f} | {1e3 * times[1]:.1f} "
                f"| {median:.1f} ({low:.1f} to {high:.1f}) |"
            )


if __name__ == "__main__":
    main()
