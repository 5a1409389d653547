"""Peak memory of a training step with kept and with recomputed hidden activations.

    python examples/benchmarks/recompute_memory.py

Each side is a process of its own, since the peak of a process never falls. `--quick` is
a tiny run that only shows that everything works.
"""

import argparse
import os
import resource
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def measure(recompute, tokens, units, hidden_units, num_experts):
    """Peak memory in MiB beyond that of the weights and inputs."""
    import tensorflow as tf

    from keras_moe import layers

    experts = layers.FeedForwardExperts(num_experts, hidden_units, recompute=recompute)
    layer = layers.MoE(experts, layers.NoisyTopKGating(k=4))
    layer.build((None, units))
    variables = [variable.value for variable in layer.trainable_variables]

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(layer(x, training=True) ** 2)
        return tape.gradient(loss, variables)

    x = tf.random.normal((tokens, units))
    step.get_concrete_function(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a batch")
    parser.add_argument("--units", type=int, default=128, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=1024, help="hidden units of an expert"
    )
    parser.add_argument("--num-experts", type=int, default=16, help="number of experts")
    parser.add_argument(
        "--child", choices=["kept", "recomputed"], help=argparse.SUPPRESS
    )
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.tokens, a.hidden_units = 2048, 256
    sizes = (a.tokens, a.units, a.hidden_units, a.num_experts)
    if a.child:
        print(measure(a.child == "recomputed", *sizes))
        return
    hidden = 4 * a.tokens * a.hidden_units * 4 / 2**20
    print(
        f"{a.tokens} tokens, {a.units} units, {a.num_experts} experts of "
        f"{a.hidden_units} hidden units, k = 4: hidden activations of {hidden:.0f} MiB.\n\n"
        "| hidden activations | peak memory of a training step (MiB) |\n|---|---|"
    )
    for side in ("kept", "recomputed"):
        arguments = [*sys.argv[1:], "--child", side]
        output = subprocess.run(
            [sys.executable, __file__, *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        print(f"| {side} | {float(output):.0f} |", flush=True)


if __name__ == "__main__":
    main()
