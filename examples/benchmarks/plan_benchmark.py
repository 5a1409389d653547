"""What a plan of a model says, and what training it takes.

    python examples/benchmarks/plan_benchmark.py
    python examples/benchmarks/plan_benchmark.py --devices 2

Each model is planned in a process of its own, and trained for five steps in others, one
for each device, so that each has a peak of its own. Measured are the bytes that
operations ask for and give back in the last three steps (TensorFlow's profiler notes
every one): the most that is out at once, with the variables, the optimizer's state and
the batch, of three steps the median and of the devices that which has most. Beside it
stands the peak by TensorFlow's own allocator, which lends out more than is asked for.
`--devices 2` has every device train a batch of its own and hold half of the experts, in
the processes of a `MultiWorkerMirroredStrategy`; `--quick` is a tiny run that only shows
that everything works.
"""

import argparse
import contextlib
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# An allocator that counts; the plain one does not.
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")

MODELS = ("blocks", "recurrent", "convolutional", "language", "factored")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--plan", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    return parser.parse_args()


def build(name, small):
    """A model and its batch, `(inputs, targets)` of one device."""
    import keras

    from keras_moe import layers, models, optimizers

    experts = layers.FeedForwardExperts
    size = 32 if small else 256
    classes = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "blocks":
        x = inputs = keras.Input((None, size))
        for _ in range(2):
            h = keras.layers.Dense(size, activation="gelu")(
                keras.layers.LayerNormalization()(x)
            )
            x = keras.layers.Add()([x, h])
            h = keras.layers.LayerNormalization()(x)
            h = layers.MoE(experts(8, 4 * size), layers.NoisyTopKGating(k=2))(h)
            x = keras.layers.Add()([x, h])
        model = keras.Model(inputs, keras.layers.Dense(100)(x))
        model.compile("adam", classes)
        shapes = (32, 128, size), (32, 128)
    elif name == "recurrent":
        inputs = keras.Input((32,), dtype="int32")
        x = keras.layers.Embedding(5000, size)(inputs)
        x = keras.layers.LSTM(size, return_sequences=True)(x)
        x = layers.MoE(experts(16, 2 * size), layers.NoisyTopKGating(k=4))(x)
        x = keras.layers.LSTM(size, return_sequences=True)(x)
        x = layers.HierarchicalMoE(experts(16, 2 * size), num_groups=4, k=(2, 2))(x)
        model = keras.Model(inputs, keras.layers.Dense(200)(x))
        model.compile("adam", classes)
        shapes = (64, 32), (64, 32)
    elif name == "convolutional":
        convolution = keras.layers.Conv2D
        model = keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                convolution(size // 8, 3, padding="same", activation="relu"),
                convolution(size // 4, 3, padding="same"),
                keras.layers.BatchNormalization(),
                keras.layers.ReLU(),
                keras.layers.MaxPooling2D(),
                convolution(size // 2, 3, padding="same", activation="relu"),
                keras.layers.MaxPooling2D(),
                keras.layers.Flatten(),
                keras.layers.Dense(size, activation="relu"),
                layers.MoE(experts(16, 4 * size), layers.NoisyTopKGating(k=2)),
                keras.layers.Dense(10),
            ]
        )
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), classes)
        shapes = (128, 32, 32, 3), (128,)
    else:
        factored = name == "factored"
        many = experts(512 if factored else 32, size, recompute=factored)
        middle = layers.MoE(many, layers.NoisyTopKGating(k=4), activation="sigmoid")
        model = models.MoELanguageModel(2000, size, middle=middle)
        model.build((None, None))
        optimizer = optimizers.FactoredAdam(1e-3) if factored else "adam"
        model.compile(optimizer, classes)
        shapes = (64, 32), (64, 32)
    if small:
        shapes = tuple((4, *shape[1:]) for shape in shapes)
    return model, shapes


def plan(name, a):
    """Bytes by the plan: weights, slots, and the peak of a device."""
    import tensorflow as tf

    from keras_moe import planning

    model, (x, y) = build(name, a.quick)
    ids = len(x) == 2
    batch = (
        tf.TensorSpec(x, tf.int32 if ids else tf.float32),
        tf.TensorSpec(y, tf.int32),
    )
    found = planning.plan(
        model,
        "h100",
        num_devices=a.devices,
        batch=batch,
        expert_parallel_size=a.devices,
        imbalance=1.0,
    )
    return found.memory.weights, found.memory.slots, found.memory.peak


def measure(name, a):
    """The same of the device of this process, measured, and the allocator's peak."""
    import keras
    import numpy as np
    import tensorflow as tf

    strategy = None
    if a.devices > 1:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model, (x, y) = build(name, a.quick)
        model.optimizer.build(model.trainable_variables)
    for layer in model._flatten_layers():
        if hasattr(layer, "gate_kernel"):  # routing that is about even
            kernel = np.random.default_rng(0).normal(size=layer.gate_kernel.shape)
            kernel /= np.linalg.norm(kernel, axis=-2, keepdims=True)
            layer.gate_kernel.assign(0.1 * kernel)
    rng = np.random.default_rng(index_of())

    if len(x) == 2:  # words; 0 would be padding, which has no expert
        inputs = rng.integers(1, 1000, x).astype("int32")
    else:
        inputs = rng.normal(size=x).astype("float32")
    data = inputs, rng.integers(0, 10, y).astype("int32")
    if strategy is None:
        step = tf.function(model.train_step, autograph=False)
        batch = tuple(map(tf.constant, data))
    else:
        batch = tuple(
            strategy.experimental_distribute_values_from_function(
                lambda _, array=array: tf.constant(array)
            )
            for array in data
        )
        step = tf.function(
            lambda batch: strategy.run(model.train_step, args=(batch,)), autograph=False
        )
    step(batch)
    tf.config.experimental.reset_memory_stats("CPU:0")
    step(batch)
    allocator = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    asked = statistics.median(profiled(step, batch, a, i) for i in range(3))
    held = [
        sum(map(bytes_here, variables))
        for variables in (model.variables, model.optimizer.variables)
    ]
    return held, asked + sum(held) + sum(array.nbytes for array in data), allocator


def index_of():
    """Which of the processes this is."""
    return json.loads(os.environ["TF_CONFIG"])["task"]["index"]


def bytes_here(variable):
    """Bytes of a variable on the device of this process."""
    parts = getattr(variable, "parts", [variable])
    return sum(part.numpy().nbytes for part in parts)


def profiled(step, batch, a, number):
    """The most bytes out at once in a step."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        wait_for_all(a, f"started_{number}")
        step(batch)
        wait_for_all(a, f"ran_{number}")
        tf.profiler.experimental.stop()
        wait_for_all(a, f"stopped_{number}")
        return most_asked(folder)


def wait_for_all(a, name):
    """Until every process has come here: a profiler that starts or stops while another
    process asks for something ends its own.
    """
    Path(a.results, f"{name}_{index_of()}").touch()
    while len(glob.glob(f"{a.results}/{name}_*")) < a.devices:
        time.sleep(0.05)


def most_asked(folder):
    """The most bytes out at once of what was asked for in a profiled step."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    with open(path, "rb") as file:
        space.ParseFromString(file.read())
    events = []
    for plane in space.planes:
        names = {key: value.name for key, value in plane.stat_metadata.items()}
        kinds = {key: value.name for key, value in plane.event_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                kind = kinds[event.metadata_id]
                if kind in ("MemoryAllocation", "MemoryDeallocation"):
                    time = line.timestamp_ns * 1000 + event.offset_ps
                    stats = {
                        names[s.metadata_id]: getattr(s, s.WhichOneof("value"))
                        for s in event.stats
                    }
                    events.append((time, kind, stats))
    return most_out(
        (kind == "MemoryAllocation", stats["addr"], stats["requested_bytes"])
        for _, kind, stats in sorted(events, key=lambda event: event[0])
    )


def most_out(events):
    """The most bytes out at once beyond those that are at the start.

    Args:
        events: `(is_taken, address, bytes)` in their order. What is given back without
            having been taken was there at the start: the old buffer of a variable, say,
            which has become another one.
    """
    held, out, most = {}, 0, 0
    for is_taken, address, size in events:
        if is_taken:
            held[address] = size
            out += size
        else:
            out -= held.pop(address, size)
        most = max(most, out)
    return most


def planned(name):
    """What `plan` returns in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--plan", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measured(name, a):
    """What `measure` returns on the device with the highest peak."""
    from keras_moe import distribution

    with tempfile.TemporaryDirectory() as folder:
        options = "--measure", name, "--results", folder
        command = [__file__, *sys.argv[1:], *options]
        if distribution.launch(command, a.devices, folder):
            logs = [Path(path).read_text() for path in glob.glob(f"{folder}/*.log")]
            raise RuntimeError("\n".join([f"Measuring {name} failed.", *logs]))
        results = [
            json.loads(Path(path).read_text()) for path in glob.glob(f"{folder}/*.json")
        ]
    return max(results, key=lambda result: result[1])


def main():
    a = parse()
    if a.plan:
        print(json.dumps(plan(a.plan, a)))
        return
    if a.measure:
        result = json.dumps(measure(a.measure, a))
        Path(a.results, f"{index_of()}.json").write_text(result)
        return
    print(
        f"{a.devices} device(s), MiB of the fullest\n\n| model | weights | plan "
        "| optimizer | plan | peak | plan | allocator's peak |\n|---|---|---|---|---|---|"
        "---|---|"
    )
    for name in a.models:
        weights, slots, peak = planned(name)
        (real_weights, real_slots), real_peak, allocator = measured(name, a)
        numbers = real_weights, weights, real_slots, slots, real_peak, peak, allocator
        mebibytes = [f"{n / 2**20:,.1f}" for n in numbers]
        mebibytes[5] += f" ({peak / real_peak - 1:+.1%})"
        print(f"| {name} | " + " | ".join(mebibytes) + " |", flush=True)


if __name__ == "__main__":
    main()
