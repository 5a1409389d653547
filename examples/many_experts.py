"""131,072 experts on one machine: builds, trains, saves, loads.

    python examples/many_experts.py

The paper's largest mixture has 256 groups of 512 experts (appendix D). Here they are
tiny, the layer is otherwise the same: hierarchical, two groups and two experts in each
for a token, FactoredAdam, hidden activations computed twice. The same job runs with 4,096
experts (64 groups of 64) of the same size; each in a process of its own. `--quick` is a
small run that only shows that everything works.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def build(groups, group_size, units, hidden_units):
    """A compiled model: one mixture between two dense layers."""
    import keras

    import keras_moe

    keras.utils.set_random_seed(0)
    experts = keras_moe.layers.FeedForwardExperts(
        groups * group_size, hidden_units, recompute=True
    )
    mixture = keras_moe.layers.HierarchicalMoE(experts, groups, k=(2, 2), name="moe")
    inputs = keras.Input((units,))
    outputs = keras.layers.Dense(1)(inputs + mixture(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(keras_moe.optimizers.FactoredAdam(1e-2), "mse")
    return model


def run(a):
    """Trains, saves, loads; the figures."""
    import keras
    import numpy as np

    start = time.perf_counter()
    model = build(a.groups, a.group_size, a.units, a.hidden_units)
    model.optimizer.build(model.trainable_variables)
    built = time.perf_counter() - start
    rng = np.random.default_rng(0)
    x = rng.normal(size=(a.tokens, a.units)).astype("float32")
    y = np.sin(3 * x[:, :1])
    seconds, processor, losses = [], [], []
    for _ in range(a.steps):
        begin = time.perf_counter(), time.process_time()
        losses.append(float(model.train_on_batch(x, y, return_dict=True)["loss"]))
        seconds.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    experts = model.get_layer("moe").experts
    slots = [s for k in experts.kernels for s in model.optimizer.slots_of(k)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        start = time.perf_counter()
        model.save(path)
        saved, size = time.perf_counter() - start, os.path.getsize(path)
        wanted = model.predict(x[:64], verbose=0)
        start = time.perf_counter()
        loaded = keras.saving.load_model(path)
        load = time.perf_counter() - start
    apart = float(np.max(np.abs(loaded.predict(x[:64], verbose=0) - wanted)))
    assert apart < 1e-5, apart
    for mine, other in zip(
        model.optimizer.variables, loaded.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(mine.numpy(), other.numpy())
    assert losses[-1] < losses[0], losses
    half = len(seconds) // 2
    return {
        "experts": a.groups * a.group_size,
        "parameters": int(model.count_params()),
        "state": sum(s.shape.num_elements() for s in slots),
        "expert_weights": sum(k.shape.num_elements() for k in experts.kernels),
        "build_s": built,
        "first_step_s": seconds[0],
        "step_s": float(np.median(seconds[half:])),
        "step_processor_s": float(np.median(processor[half:])),
        "least_step_s": min(seconds),
        "losses": [losses[0], losses[-1]],
        "save_s": saved,
        "file_mb": size / 1e6,
        "load_s": load,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=512)
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--hidden-units", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="small, for a test")
    a = parser.parse_args()
    if a.quick:
        a.tokens = 2048
    if a.child:
        print(json.dumps(run(a)))
        return
    shapes = [(64, 64), (a.groups, a.group_size)]
    if a.quick:
        shapes = [(8, 8), (32, 32)]
    results = []
    for groups, group_size in shapes:
        shape = ["--groups", str(groups), "--group-size", str(group_size)]
        output = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], *shape, "--child"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        results.append(json.loads(output.splitlines()[-1]))
        print(json.dumps(results[-1], indent=2), flush=True)
    for name in ("step_s", "step_processor_s", "least_step_s"):
        print(f"{name}: {results[1][name] / results[0][name]:.2f} times as long")


if __name__ == "__main__":
    main()
