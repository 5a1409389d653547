"""Step time of a hierarchical mixture of many experts over one of few.

    python examples/benchmarks/hierarchical_benchmark.py

Equal k, equal tokens, equal experts: 32 groups of 32 against 8 groups of 8. The two
sides alternate in one run; what counts is the ratio of a pair. The limit is the longer of the
time of the few and of what the memory takes for the weights of the many (`bandwidth.py`).
`--quick` is a tiny run that only shows that everything works.
"""

import argparse
import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import bandwidth
import keras
import tensorflow as tf
from alternating import compare, make_steps

from keras_moe import layers


def make_layer_steps(num_groups, group_size, units, hidden_units):
    """A training step (gradients of all weights) and a forward pass."""
    layer = layers.HierarchicalMoE(
        layers.FeedForwardExperts(num_groups * group_size, hidden_units), num_groups
    )
    layer.build((None, units))
    # Columns of equal norm route about as evenly as a gate trained with the losses.
    for kernel in (layer.gating.primary_gating.gate_kernel, layer.gating.gate_kernel):
        random = tf.random.normal(kernel.shape, seed=0)
        kernel.assign(0.1 * tf.math.l2_normalize(random, axis=-2))

    def call(x, training):
        return layer(x, training=training), layer.losses

    steps = make_steps(call, layer.trainable_variables)
    return {"training": steps["training"], "forward": steps["forward"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 16384, 32768, 65536]
    )
    parser.add_argument("--units", type=int, default=256, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=128, help="hidden units of an expert"
    )
    parser.add_argument(
        "--pairs", type=int, default=11, help="pairs of alternating measurements"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.tokens, a.units, a.hidden_units, a.pairs = [64], 8, 8, 2
    keras.utils.set_random_seed(0)
    memory = bandwidth.measure(quick=a.quick)
    num_bytes = bandwidth.weight_bytes(1024, a.units, a.hidden_units)
    few = make_layer_steps(8, 8, a.units, a.hidden_units)
    many = make_layer_steps(32, 32, a.units, a.hidden_units)
    print(
        f"{a.units} units, {a.hidden_units} hidden units, "
        f"k = 2 x 2, {a.pairs} pairs, TensorFlow {tf.__version__}, "
        f"{os.cpu_count()} cores\n{memory}\n\n"
        "| tokens | step | 64 experts (ms) | 1,024 experts (ms) | ratio | quartiles |"
        + bandwidth.HEADER.format("many")
        + "\n|---|---|---|---|---|---|"
        + bandwidth.LINES
    )
    for tokens, name in itertools.product(a.tokens, few):
        x = tf.random.normal((tokens, a.units))
        (many_s, few_s), (low, middle, high) = compare(
            many[name], few[name], (x,), a.pairs
        )
        limit = bandwidth.cells(many_s, few_s, memory.least_seconds(name, num_bytes))
        print(
            f"| {tokens:,} | {name} | {few_s * 1e3:.1f} | {many_s * 1e3:.1f} | {middle:.2f} "
            f"| {low:.2f} - {high:.2f} |{limit}",
            flush=True,
        )


if __name__ == "__main__":
    main()
