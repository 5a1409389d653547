"""Peak memory of a training step over what it cannot do without.

    python examples/benchmarks/layer_memory.py

What a step cannot do without: weights, their gradients, the inputs, and the hidden
activations of k experts a token. The peak is that of TensorFlow's allocator on the CPU.
Every line is a process of its own. `--quick` is a tiny run that only shows that everything
works.
"""

import argparse
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Where oneDNN is off, and its allocator with it, the plain one counts nothing.
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")

K = 4


def needed(a, num_experts):
    """Bytes of weights, gradients, inputs and hidden activations."""
    weights = num_experts * 2 * a.units * a.hidden_units + 2 * a.units * num_experts
    return 4 * (2 * weights + a.tokens * a.units + K * a.tokens * a.hidden_units)


def measure(a, num_experts):
    """Most bytes that TensorFlow's allocator has lent out during one step.

    What the process holds of the system is more: the allocator keeps what it gets back.
    """
    import tensorflow as tf

    from keras_moe import layers

    layer = layers.MoE(
        layers.FeedForwardExperts(num_experts, a.hidden_units, recompute=a.recompute),
        layers.NoisyTopKGating(k=K),
    )
    layer.build((None, a.units))
    kernel = layer.gating.gate_kernel
    kernel.assign(0.1 * tf.math.l2_normalize(tf.random.normal(kernel.shape), axis=0))
    variables = [variable.value for variable in layer.trainable_variables]

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(layer(x, training=True) ** 2) + sum(layer.losses)
        return tape.gradient(loss, variables)

    x = tf.random.normal((a.tokens, a.units))
    step(x)
    tf.config.experimental.reset_memory_stats("CPU:0")
    step(x)
    return tf.config.experimental.get_memory_info("CPU:0")["peak"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--experts", type=int, nargs="+", default=[4, 32, 64, 256, 1024]
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a batch")
    parser.add_argument("--units", type=int, default=512, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=1024, help="hidden units of an expert"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="do not keep hidden activations"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.tokens, a.units, a.hidden_units = [8], 256, 32, 64
    if a.child:
        print(measure(a, a.child))
        return
    print(
        f"{a.tokens} tokens, {a.units} units, {a.hidden_units} hidden units, k = {K}\n\n"
        "| experts | needed (MiB) | peak of a training step (MiB) | peak / needed |\n"
        "|---|---|---|---|"
    )
    for num_experts in a.experts:
        output = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", str(num_experts)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        peak, least = int(output.splitlines()[-1]), needed(a, num_experts)
        print(
            f"| {num_experts:,} | {least / 2**20:,.0f} | {peak / 2**20:,.0f} "
            f"| {peak / least:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
