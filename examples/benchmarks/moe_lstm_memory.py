"""Peak memory of a training step of MoELSTM over long sequences.

    python examples/benchmarks/moe_lstm_memory.py

With and without `segment_length`. Each side is a process of its own, since the peak of a
process never falls. `--quick` is a tiny run that only shows that everything works.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def measure(segment_length, steps, batch, units, num_experts):
    """Peak memory in MiB beyond that of weights and inputs; seconds of a step."""
    import tensorflow as tf

    from keras_moe import layers

    layer = layers.MoELSTM(
        units, num_experts, segment_length=segment_length, return_sequences=True
    )
    layer.build((batch, steps, units))
    variables = [variable.value for variable in layer.trainable_variables]

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(layer(x, training=True) ** 2) + sum(layer.losses)
        return tape.gradient(loss, variables)

    x = tf.random.normal((batch, steps, units))
    step.get_concrete_function(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    step(x)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak - before) / 1024, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=512, help="time steps")
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch")
    parser.add_argument("--units", type=int, default=64, help="width of the model")
    parser.add_argument("--num-experts", type=int, default=16, help="number of experts")
    parser.add_argument(
        "--segment-length",
        type=int,
        default=23,
        help="steps that are computed again together",
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.steps, a.batch = 64, 8
    if a.child is not None:
        print(*measure(a.child or None, a.steps, a.batch, a.units, a.num_experts))
        return
    print(
        f"{a.steps} steps, batch {a.batch}, {a.units} units, {a.num_experts} experts, "
        "k = 4\n\n| segments | peak memory of a training step (MiB) | seconds |\n"
        "|---|---|---|"
    )
    for segment_length in (0, a.segment_length):
        output = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", str(segment_length)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        memory, seconds = map(float, output.split())
        name = f"of {segment_length} steps" if segment_length else "none"
        print(f"| {name} | {memory:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
