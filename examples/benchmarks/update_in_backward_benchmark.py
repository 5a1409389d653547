"""Steps of experts in the backward pass against ordinary ones: time and peak memory.

    python examples/benchmarks/update_in_backward_benchmark.py

One mixture, unrolled, with `FactoredAdam`. The peak is that of TensorFlow's allocator on the
CPU in the third step, weights and optimizer state included; each line of it is a process of
its own. Times are of two sides that alternate in one process; a ratio above 1 means that
steps in the backward pass are faster. `--quick` is a tiny run that only shows that everything
works.
"""

import argparse
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIDES = ("ordinary", "in the backward pass")


def make_step(a, side):
    import keras
    import tensorflow as tf

    from keras_moe import layers, optimizers

    keras.utils.set_random_seed(0)
    layer = layers.MoE(
        layers.FeedForwardExperts(a.experts, a.hidden_units, computation="unrolled"),
        layers.NoisyTopKGating(k=a.k),
    )
    layer.build((None, a.units))
    kernel = layer.gating.gate_kernel
    kernel.assign(0.1 * tf.math.l2_normalize(tf.random.normal(kernel.shape), axis=0))
    optimizer = optimizers.FactoredAdam(1e-3, update_in_backward=side == SIDES[1])
    variables = layer.trainable_variables
    optimizer.build(variables)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(layer(x, training=True) ** 2) + sum(layer.losses)
            loss = optimizer.scale_loss(loss)
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    return step


def measure_peak(a):
    """Most bytes that TensorFlow's allocator has lent out in a step."""
    import tensorflow as tf

    step, x = make_step(a, a.child), tf.random.normal((a.tokens, a.units))
    step(x)
    step(x)
    tf.config.experimental.reset_memory_stats("CPU:0")
    step(x)
    return tf.config.experimental.get_memory_info("CPU:0")["peak"]


def peak_of(side):
    output = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child", side],
        env={**os.environ, "TF_CPU_ALLOCATOR_USE_BFC": "true"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return int(output.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=256, help="number of experts")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--k", type=int, default=4, help="experts of a token")
    parser.add_argument("--units", type=int, default=512, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=1024, help="hidden units of an expert"
    )
    parser.add_argument(
        "--pairs", type=int, default=7, help="pairs of alternating measurements"
    )
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.tokens, a.units, a.hidden_units, a.pairs = 16, 32, 64, 128, 2
    if a.child:
        print(measure_peak(a))
        return
    import tensorflow as tf
    from alternating import compare
    from bandwidth import weight_bytes

    weights = weight_bytes(a.experts, a.units, a.hidden_units)
    print(
        f"{a.experts} experts, {a.tokens} tokens, k = {a.k}, {a.units} units, "
        f"{a.hidden_units} hidden units\n\n"
        "| step | experts' weights (MiB) | peak (MiB) | peak / weights |\n"
        "|---|---|---|---|"
    )
    for side in SIDES:
        peak = peak_of(side)
        print(
            f"| {side} | {weights / 2**20:,.1f} | {peak / 2**20:,.1f} "
            f"| {peak / weights:.2f} |",
            flush=True,
        )
    x = tf.random.normal((a.tokens, a.units))
    steps = [make_step(a, side) for side in SIDES]
    (ordinary, early), (low, middle, high) = compare(*steps, (x,), a.pairs)
    print(
        "\n| ordinary (ms) | in the backward pass (ms) | ratio | quartiles |\n"
        "|---|---|---|---|\n"
        f"| {ordinary * 1e3:.0f} | {early * 1e3:.0f} | {middle:.2f} "
        f"| {low:.2f} - {high:.2f} |"
    )


if __name__ == "__main__":
    main()
