"""Many experts against 64 of the same size, the first call, and skewed routing.

    python examples/benchmarks/many_experts_benchmark.py

Equal k, equal tokens, equal experts: 1,024 flat and 4,096 in 64 groups against 64 flat, a
ratio above 1 meaning that the many are faster. No layer can undercut the limit beside it: the
longer of the time of the few and of what the memory takes for the weights (`bandwidth.py`).
Then all tokens to the same experts against balanced routing, for a plan of products expert
by expert and for one of blocks. The sides alternate in one run. `--quick` is a tiny run
that only shows that everything works.
"""

import argparse
import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import bandwidth
import keras
import numpy as np
import tensorflow as tf
from alternating import compare, make_steps, seconds

from keras_moe import layers


def make_mixture(num_experts, hidden_units, units, k=4, num_groups=None, skewed=False):
    """A flat layer, or a hierarchical one; skewed, every token has the same k experts."""
    experts = layers.FeedForwardExperts(num_experts, hidden_units)
    if num_groups:
        layer = layers.HierarchicalMoE(experts, num_groups)
        layer.build((None, units))
        gates = (layer.gating.primary_gating, layer.gating)
    else:
        normalization = "selected" if k > 1 else "all"
        layer = layers.MoE(
            experts, layers.NoisyTopKGating(k=k, normalization=normalization)
        )
        layer.build((None, units))
        gates = (layer.gating,)
    for gate in gates:
        # Columns of equal norm route about as evenly as a gate trained with the losses.
        kernel = gate.gate_kernel
        values = tf.math.l2_normalize(tf.random.normal(kernel.shape, seed=0), axis=-2)
        if skewed:  # the first feature is 1, and decides
            values = np.zeros(kernel.shape, "float32")
            values[..., 0, :] = -100.0 * np.arange(kernel.shape[-1])
        kernel.assign(0.1 * values)

    def call(x, training):
        return layer(x, training=training), layer.losses

    return make_steps(call, layer.trainable_variables)


def many_against_few(a):
    few = make_mixture(a.few, a.hidden_units, a.units)
    memory = bandwidth.measure(quick=a.quick)
    print(
        f"{memory}\n\n| experts | tokens | step | 64 experts (ms) | many (ms) | 64 / many "
        "| quartiles |"
        + bandwidth.HEADER.format("many")
        + "\n|---|---|---|---|---|---|---|"
        + bandwidth.LINES
    )
    firsts = []
    for name, num_experts, num_groups in (
        ("flat", a.flat, None),
        ("hierarchical", a.hierarchical, int(a.hierarchical**0.5)),
    ):
        many = make_mixture(num_experts, a.hidden_units, a.units, num_groups=num_groups)
        num_bytes = bandwidth.weight_bytes(num_experts, a.units, a.hidden_units)
        x = tf.random.normal((a.tokens[0], a.units))
        firsts.append((num_experts, *(seconds(step, x) for step in many.values())))
        for tokens, step in itertools.product(a.tokens, many):
            x = tf.random.normal((tokens, a.units))
            (few_s, many_s), (low, middle, high) = compare(
                few[step], many[step], (x,), a.pairs
            )
            least = memory.least_seconds(step, num_bytes)
            limit = bandwidth.cells(many_s, few_s, least)
            print(
                f"| {num_experts:,} {name} | {tokens:,} | {step} | {few_s * 1e3:.1f} "
                f"| {many_s * 1e3:.1f} | {middle:.2f} | {low:.2f} - {high:.2f} |{limit}",
                flush=True,
            )
    print("\n| experts | first call, forward (s) | training (s) |\n|---|---|---|")
    for num_experts, forward, training in firsts:
        print(f"| {num_experts:,} | {forward:.1f} | {training:.1f} |", flush=True)


def skewed_against_balanced(a):
    print(
        "\n| experts | k | step | balanced (ms) | skewed (ms) | skewed / balanced "
        "| quartiles |\n|---|---|---|---|---|---|---|"
    )
    x = np.random.default_rng(0).standard_normal((a.tokens[0], a.units), "float32")
    x[:, 0] = 1.0
    x = tf.constant(x)
    for num_experts, k in ((a.few // 2, 1), (a.few // 2, 4), (a.flat, 1), (a.flat, 4)):
        sides = [
            make_mixture(num_experts, a.hidden_units, a.units, k=k, skewed=skewed)
            for skewed in (True, False)
        ]
        for step in ("forward", "training"):
            (skewed_s, balanced_s), (low, middle, high) = compare(
                sides[0][step], sides[1][step], (x,), a.pairs
            )
            print(
                f"| {num_experts:,} | {k} | {step} | {balanced_s * 1e3:.1f} "
                f"| {skewed_s * 1e3:.1f} | {middle:.2f} | {low:.2f} - {high:.2f} |",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[4096, 65536],
        help="tokens in a batch; the first call and skew are measured with the first",
    )
    parser.add_argument("--units", type=int, default=512, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=128, help="hidden units of an expert"
    )
    parser.add_argument(
        "--pairs", type=int, default=7, help="pairs of alternating measurements"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    a.few, a.flat, a.hierarchical = 64, 1024, 4096
    if a.quick:
        a.tokens, a.units, a.hidden_units, a.pairs = [64], 8, 8, 2
        a.few, a.flat, a.hierarchical = 8, 144, 16
    keras.utils.set_random_seed(0)
    print(
        f"{a.units} units, {a.hidden_units} hidden units, {a.pairs} pairs, "
        f"TensorFlow {tf.__version__}, {os.cpu_count()} cores\n"
    )
    many_against_few(a)
    skewed_against_balanced(a)


if __name__ == "__main__":
    main()
