"""A few tokens through many experts, as in decoding.

    python examples/benchmarks/inference_benchmark.py

With 1, 8 or 64 tokens hardly any arithmetic is shared, and the limit is the time to read
the chosen experts' weights and multiply with them: for every assignment of a token to an
expert two products of one row. The two sides alternate in one run. Beside them: what the
memory takes to read these weights (`bandwidth.py`), where no cache has them from the run
before. `--quick` is a tiny run that only shows that everything works.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import bandwidth
import keras
import tensorflow as tf
from alternating import compare

from keras_moe import layers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[32, 256], help="numbers of experts"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        help="numbers of tokens in a batch",
    )
    parser.add_argument("--units", type=int, default=512, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=1024, help="hidden units of an expert"
    )
    parser.add_argument("--k", type=int, default=4, help="experts for each token")
    parser.add_argument(
        "--pairs", type=int, default=51, help="pairs of alternating measurements"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--known", action="store_true", help="graphs of a known number of tokens"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.units, a.hidden_units, a.pairs = [8], 8, 12, 2
    keras.utils.set_random_seed(a.seed)
    memory = bandwidth.measure(quick=a.quick)
    print(
        f"{a.units} units, {a.hidden_units} hidden units, k = {a.k}, {a.pairs} pairs, "
        f"TensorFlow {tf.__version__}, {os.cpu_count()} cores\n{memory}\n\n"
        "| experts | tokens | mixture (ms) | chosen weights alone (ms) | ratio | quartiles "
        "| reading them (ms) |\n|---|---|---|---|---|---|---|"
    )
    for num_experts in a.experts:
        layer = layers.MoE(
            layers.FeedForwardExperts(num_experts, a.hidden_units),
            layers.NoisyTopKGating(k=a.k),
        )
        layer.build((None, a.units))
        kernel = layer.gating.gate_kernel
        kernel.assign(tf.random.normal(kernel.shape))
        unknown = [tf.TensorSpec((None, a.units), tf.float32)]
        mixture = tf.function(layer, input_signature=None if a.known else unknown)
        for tokens in a.tokens:
            x = tf.random.normal((tokens, a.units))
            # The weights the gate chooses, side by side, each expert once.
            chosen = tf.unique(tf.reshape(layer.route(x).expert_indices, [-1]))[0]
            # Of the tensors: a gather from a variable would make TensorFlow copy the
            # whole variable whenever it is read from then on.
            first, last = (
                tf.gather(tf.convert_to_tensor(kernel), chosen)
                for kernel in layer.experts.kernels
            )
            rows = -(-tokens * a.k // chosen.shape[0])
            inputs = tf.random.normal((chosen.shape[0], rows, a.units))

            @tf.function
            def limit(inputs, first=first, last=last):
                return tf.matmul(tf.nn.relu(tf.matmul(inputs, first)), last)

            (mixture_s, limit_s), (low, middle, high) = compare(
                lambda x=x, f=mixture: f(x),
                lambda inputs=inputs, f=limit: f(inputs),
                (),
                a.pairs,
            )
            num_bytes = bandwidth.weight_bytes(chosen.shape[0], a.units, a.hidden_units)
            reading_s = memory.least_seconds("forward", num_bytes)
            print(
                f"| {num_experts} | {tokens} | {mixture_s * 1e3:.2f} | {limit_s * 1e3:.2f} "
                f"| {middle:.2f} | {low:.2f} - {high:.2f} | {reading_s * 1e3:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
