"""Few tokens and thousands of experts: steps of only those that are chosen.

    python examples/benchmarks/few_tokens_benchmark.py

A training step with an optimizer's, of a mixture with `computation="blocks"`, whose
gradients are as large as the weights of all experts, and of the same with
`computation="chosen"`. The sides alternate in one run; a ratio above 1 means that
`"chosen"` is faster. The limit beside it is what the memory (`bandwidth.py`) takes for the
weights of the experts that were chosen: a copy of them, products that read it twice, the
gradients and the optimizer. Choices in training are drawn with noise, so their number is
that of one draw. `--quick` is a tiny run that only shows that everything works.
"""

import argparse
import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import bandwidth
import keras
import tensorflow as tf
from alternating import compare, make_steps

from keras_moe import layers, optimizers

# Those of `bandwidth.OPTIMIZERS` that pass over the same arrays, after the name.
OPTIMIZERS = {
    "SGD": ("sgd", lambda: keras.optimizers.SGD(0.01)),
    "Adam": ("adam", lambda: keras.optimizers.Adam(0.001)),
    "FactoredAdam": ("factored_adam", lambda: optimizers.FactoredAdam(0.001)),
    "FactoredAdam, not factored, keep": (
        "adam",
        lambda: optimizers.FactoredAdam(0.001, factored=[], untouched_rows="keep"),
    ),
}


def make_side(computation, num_experts, options, make_optimizer):
    """Two functions of tokens: the step, and how many experts it chooses."""
    experts = layers.FeedForwardExperts(
        num_experts, options.hidden_units, computation=computation
    )
    layer = layers.MoE(experts, layers.NoisyTopKGating(k=options.k))
    layer.build((None, options.units))
    # Columns of equal norm route about as evenly as a gate trained with the losses.
    kernel = layer.gating.gate_kernel
    values = tf.math.l2_normalize(tf.random.normal(kernel.shape, seed=0), axis=0)
    kernel.assign(0.1 * values)

    def call(x, training):
        return layer(x, training=training), layer.losses

    @tf.function
    def chosen(x):
        gates = layer.gating(x, training=True)
        return tf.size(tf.unique(tf.reshape(gates.expert_indices, [-1]))[0])

    steps = make_steps(call, layer.trainable_variables, make_optimizer())
    return steps["update"], chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--hidden-units", type=int, default=64)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.tokens, a.units, a.hidden_units, a.pairs = [32], [4], 8, 8, 2
    keras.utils.set_random_seed(0)
    memory = bandwidth.measure(quick=a.quick)
    print(
        f"k = {a.k}, {a.units} units, {a.hidden_units} hidden units; {memory}\n\n"
        "| experts | tokens | optimizer | chosen | blocks (ms) | chosen (ms) "
        "| blocks / chosen | quartiles |" + bandwidth.HEADER.format("chosen") + "\n"
        "|---|---|---|---|---|---|---|---|" + bandwidth.LINES
    )
    for num_experts, name in itertools.product(a.experts, a.optimizers):
        kind, make_optimizer = OPTIMIZERS[name]
        blocks, _ = make_side("blocks", num_experts, a, make_optimizer)
        chosen, number = make_side("chosen", num_experts, a, make_optimizer)
        for tokens in a.tokens:
            x = tf.random.normal((tokens, a.units))
            used = int(number(x))
            (before, after), (low, middle, high) = compare(
                blocks, chosen, (x,), a.pairs
            )
            size = bandwidth.weight_bytes(used, a.units, a.hidden_units)
            least = memory.least_seconds("training", size, kind)
            least += size * (1 / memory.read + 1 / memory.write)
            limit = bandwidth.cells(after, 0.0, least)
            print(
                f"| {num_experts:,} | {tokens} | {name} | {used:,} "
                f"| {before * 1e3:.1f} | {after * 1e3:.1f} | {middle:.2f} "
                f"| {low:.2f} - {high:.2f} |{limit}",
                flush=True,
            )
        del blocks, chosen, number
        keras.backend.clear_session()


if __name__ == "__main__":
    main()
