"""What the settings of the memory allocator do to a training step on the CPU.

    python examples/benchmarks/allocator_benchmark.py
    python examples/benchmarks/allocator_benchmark.py --model mixture --experts 256

Large tensors that are made and given back in every step cost page faults: the C library
returns their memory to the system, which hands out zeroed pages again. Each setting is a
process of its own, because it must stand in the environment before TensorFlow starts; the
processes take turns within one run, so that a ratio holds where the machine's speed changes.
`CPU` is the time of all threads. `--quick` is a tiny run that only shows that everything
works.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
from step_arguments import add_sizes

SETTINGS = {
    "as it is": {},
    "TF_CPU_ALLOCATOR_USE_BFC=true": {"TF_CPU_ALLOCATOR_USE_BFC": "true"},
    "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    },
    "GLIBC_TUNABLES=glibc.malloc.hugetlb=1": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"
    },
}


def language_model(a):
    """A training step of the language model of `step_benchmark.py`."""
    import keras
    from step_benchmark import make_model

    keras.utils.set_random_seed(0)
    model = make_model("moe", a)
    tokens = np.random.default_rng(0).integers(3, a.vocabulary, (2, a.batch, a.time))
    x, y = tokens.astype("int32")
    return lambda: np.asarray(model.train_on_batch(x, y))


def mixture(a):
    """A training step of one mixture, with Adam."""
    import keras
    import tensorflow as tf
    from alternating import make_steps

    from keras_moe import layers

    keras.utils.set_random_seed(0)
    layer = layers.MoE(
        layers.FeedForwardExperts(a.experts, a.hidden_units, use_bias=False),
        layers.NoisyTopKGating(k=4, gate_initializer="glorot_uniform"),
    )
    x = tf.random.normal((a.batch * a.time, a.units))
    layer.build(x.shape)

    def call(x, training):
        return layer(x, training=training), layer.losses

    variables = layer.trainable_variables
    step = make_steps(call, variables, keras.optimizers.Adam(1e-3))["update"]
    return lambda: step(x).numpy()


MODELS = {"language": language_model, "mixture": mixture}


def serve(a):
    """In a child: runs the steps whenever a line comes in, and says what they cost."""
    step = MODELS[a.model](a)
    for _ in range(3):
        step()
    for _ in sys.stdin:
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(a.steps):
            step()
        wall, after = time.perf_counter() - start, resource.getrusage(0)
        costs = {
            "wall": wall / a.steps,
            "cpu": (
                (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
            )
            / a.steps,
            "faults": (after.ru_minflt - before.ru_minflt) / a.steps,
            "peak": after.ru_maxrss * 1024,
        }
        print("COSTS " + json.dumps(costs), flush=True)


def start(variables):
    arguments = [sys.executable, __file__, *sys.argv[1:], "--child"]
    return subprocess.Popen(
        arguments,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def costs_of(child):
    child.stdin.write("\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith("COSTS "):
            return json.loads(line.removeprefix("COSTS "))
    raise RuntimeError("A process ended without a result; its message stands above.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=MODELS, default="language", help="what makes the step"
    )
    add_sizes(parser)
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each setting")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.units, a.hidden_units, a.vocabulary = 4, 8, 8, 50
        a.batch, a.time, a.steps, a.rounds = 2, 4, 1, 2
    if a.child:
        serve(a)
        return
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(start(v)) for v in SETTINGS.values()]
        rounds = [[costs_of(child) for child in children] for _ in range(a.rounds)]
        for child in children:
            child.stdin.close()
    print(
        f"{a.model}: {a.experts} experts, {a.units} units, {a.hidden_units} hidden "
        f"units, {a.batch} x {a.time} tokens, {a.rounds} rounds of {a.steps} steps\n\n"
        "| setting | step (ms) | CPU (ms) | faults | peak (MiB) | step / as it is "
        "| quartiles | CPU / as it is |\n" + "|---" * 8 + "|"
    )

    def column(i, key):
        return np.array([costs[i][key] for costs in rounds])

    for i, setting in enumerate(SETTINGS):
        ratios = column(i, "wall") / column(0, "wall")
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        cpu = np.median(column(i, "cpu") / column(0, "cpu"))
        print(
            f"| `{setting}` | {np.median(column(i, 'wall')) * 1e3:.1f} "
            f"| {np.median(column(i, 'cpu')) * 1e3:.1f} "
            f"| {np.median(column(i, 'faults')):,.0f} "
            f"| {column(i, 'peak').max() / 2**20:,.0f} "
            f"| {middle:.2f} | {low:.2f} - {high:.2f} | {cpu:.2f} |"
        )


if __name__ == "__main__":
    main()
