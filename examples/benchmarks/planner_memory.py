"""What the planner predicts, and what models built and trained here take.

    python examples/benchmarks/planner_memory.py

Each configuration is a process of its own: it builds the model, adds up the bytes of its
variables and of the optimizer's, and trains two steps. The peak is what is resident at
most in the second step, less what was resident before it, plus the variables and slots.
Linux only. `--quick` is a tiny run that only shows that everything works.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

TIME = 32
SMALL = {
    "vocabulary_size": 2000,
    "units": 128,
    "num_sampled": None,
    "hidden_units": 1024,
    "batch_tokens": 8192,
}
SAVING = {"recompute": True, "expert_optimizer": "factored_adam"}
CONFIGURATIONS = {
    "two LSTMs, no mixture": ("4xlstm_512", {**SMALL, "middle": "none"}),
    "one projected LSTM": ("lstm_2048_512", {**SMALL, "lstm_units": 512}),
    "100,000 words, sampled": (
        "moe_32",
        {**SMALL, "vocabulary_size": 100_000, "num_sampled": 4096, "hidden_units": 256},
    ),
    "32 experts, Adam": ("moe_32", SMALL),
    "256 experts, Adam": ("moe_256", SMALL),
    "256 experts, factored, recomputed": ("moe_256_h", {**SMALL, **SAVING}),
    "1,024 experts in 16 groups, Adam": ("moe_1024_h", {**SMALL, "hidden_units": 256}),
    "1,024 experts in 16 groups, factored": (
        "moe_1024_h",
        {**SMALL, "hidden_units": 256, **SAVING},
    ),
}


def preset_of(name):
    """The preset of a configuration, for one device."""
    from keras_moe import models

    base, changes = CONFIGURATIONS[name]
    return dataclasses.replace(models.preset(base), name=name, **changes)


def predict(preset):
    """Bytes of variables and slots, and of the peak."""
    from keras_moe import planning

    memory = planning.plan(preset, "k40", num_devices=1, imbalance=1.0).memory
    return memory.variables_and_slots, memory.peak


def resident(key):
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(key)


def measure(preset):
    """The same, measured in this process."""
    import keras
    import numpy as np
    import tensorflow as tf

    from keras_moe import models, optimizers

    model = models.build_language_model(preset)
    factored = preset.expert_optimizer == "factored_adam"
    kind = optimizers.FactoredAdam if factored else keras.optimizers.Adam
    model.compile(
        kind(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.build((None, None))
    model.optimizer.build(model.trainable_variables)
    spec = tf.TensorSpec((None, None), tf.int32)
    step = tf.function(model.train_step, input_signature=[(spec, spec)])
    rng = np.random.default_rng(0)

    def batch(rows):
        x = rng.integers(1, preset.vocabulary_size, (rows, TIME + 1)).astype("int32")
        return tf.constant(x[:, :-1]), tf.constant(x[:, 1:])

    step(batch(2))
    whole = batch(preset.batch_tokens // TIME)
    step(whole)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest mark falls to what is resident now
    step(whole)
    rise = resident("VmHWM") - before
    variables = [*model.weights, *model.optimizer.variables]
    held = sum(v.numpy().nbytes for v in variables)
    return held, held + rise


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        SMALL["batch_tokens"] = 256
    if a.child:
        preset = dataclasses.replace(
            preset_of(a.child), batch_tokens=SMALL["batch_tokens"]
        )
        print(json.dumps([*predict(preset), *measure(preset)]))
        return
    print(
        f"{SMALL['batch_tokens']:,} tokens, {SMALL['units']} units; MiB\n\n"
        "| configuration | variables and slots | predicted | peak | predicted |\n"
        "|---|---|---|---|---|",
        flush=True,
    )
    names = list(CONFIGURATIONS)
    for name in names[-1:] if a.quick else names:
        output = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        held, peak, real_held, real_peak = json.loads(output.splitlines()[-1])
        print(
            f"| {name} | {real_held / 2**20:,.1f} | {held / 2**20:,.1f} "
            f"({held / real_held - 1:+.1%}) | {real_peak / 2**20:,.0f} | "
            f"{peak / 2**20:,.0f} ({peak / real_peak - 1:+.0%}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
