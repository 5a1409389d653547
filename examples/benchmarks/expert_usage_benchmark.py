"""What the callback `ExpertUsage` costs a training step.

    python examples/benchmarks/expert_usage_benchmark.py

The language model of `python -m keras_moe train-lm`, trained by `fit` in epochs of as
many steps as the callback's default interval, in turn without and with the callback,
which writes TensorBoard files. Time is that of the processor, which other work on the
machine disturbs less than the clock.

Measured are the ratio of the two, pair by pair; and, since the difference is small, its
parts by themselves: a step, one point of the log, what happens between points, and
the entropy of the gates, which layers add up with or without the callback.
`--quick` is a tiny run that only shows that everything works.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from step_benchmark import make_model

from keras_moe import functional, telemetry


def processor_seconds(function, *arguments, **options):
    start = time.process_time()
    function(*arguments, **options)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--hidden-units", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=6_500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--time", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.units, a.hidden_units, a.vocabulary = 4, 8, 8, 50
        a.pairs, a.steps = 2, 3
    keras.utils.set_random_seed(0)
    model = make_model("moe", a)
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, a.vocabulary, (2, a.batch, a.time)).astype("int32")
    data = tf.data.Dataset.from_tensors((tokens[0], tokens[1])).repeat()

    def fit(callbacks):
        model.fit(
            data, steps_per_epoch=a.steps, verbose=0, shuffle=False, callbacks=callbacks
        )

    with tempfile.TemporaryDirectory() as folder:
        usage = telemetry.ExpertUsage(folder)
        fit([])
        fit([usage])
        pairs = [
            (processor_seconds(fit, []), processor_seconds(fit, [usage]))
            for _ in range(a.pairs)
        ]
        step = statistics.median(without for without, _ in pairs) / a.steps
        point, between = cost_of_callback(model, usage)
    entropy = cost_of_entropy(a.batch * a.time)
    share = (point / usage.interval + between + entropy) / step
    ratios = np.percentile([b / a for a, b in pairs], [25, 50, 75])
    print(
        f"{a.experts} experts, {a.units} units, {a.batch} x {a.time} tokens, epochs of "
        f"{a.steps} steps, {a.pairs} pairs; milliseconds of processor time\n\n"
        "| step | one point | between points | entropy of gates | all, a step "
        "| with / without, quartiles |\n|---|---|---|---|---|---|\n"
        f"| {step * 1e3:.1f} | {point * 1e3:.2f} | {between * 1e3:.5f} "
        f"| {entropy * 1e3:.3f} | {share:.2%} "
        f"| {ratios[0]:.3f}, {ratios[1]:.3f}, {ratios[2]:.3f} |"
    )


def cost_of_callback(model, usage, repetitions=50):
    """Processor seconds of a point with TensorBoard, and of a step between points."""
    usage.set_model(model)
    usage.on_train_begin()
    usage.on_epoch_begin(0)
    points, steps = [], []
    for number in range(1, repetitions + 1):
        due = number * usage.interval
        points.append(processor_seconds(usage.on_train_batch_begin, due))
        steps.append(
            processor_seconds(
                lambda due=due: [
                    usage.on_train_batch_begin(due + 1) for _ in range(999)
                ]
            )
        )
    return statistics.median(points), statistics.median(steps) / 999


def cost_of_entropy(num_tokens, k=4, repetitions=200):
    """Processor seconds of what is added to a step of training."""
    gates = tf.nn.softmax(tf.random.normal((num_tokens, k)))
    sums = tf.Variable(tf.zeros(2, tf.float64))

    @tf.function
    def add():
        entropy, tokens = functional.gate_entropy(gates, num_tokens)
        sums.assign_add(tf.stack([tf.cast(x, tf.float64) for x in (entropy, tokens)]))

    @tf.function
    def nothing():
        sums.assign_add(tf.zeros(2, tf.float64))

    medians = []
    for function in (add, nothing):
        function()
        medians.append(
            statistics.median(processor_seconds(function) for _ in range(repetitions))
        )
    return max(0.0, medians[0] - medians[1])


if __name__ == "__main__":
    main()
