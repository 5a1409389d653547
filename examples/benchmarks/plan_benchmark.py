"""What a plan of a model says, and what training it takes.

    python examples/benchmarks/plan_benchmark.py

Each model is planned in a process of its own, and trained for five steps in another, on
logical devices of the CPU. Measured are the bytes that operations ask for and give back in
the last three steps (TensorFlow's profiler notes every one): the most that is out at once,
of three steps the median, with the variables, the optimizer's state and the batch. Beside
it stands the peak by TensorFlow's own allocator, which lends out more than is asked for.
`--devices 2` has every device train a batch of its own and hold half of the experts;
`--quick` is a tiny run that only shows that everything works.
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
    """The same, measured; peaks are the mean of the devices."""
    import keras
    import numpy as np
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    strategy = None
    if a.devices > 1:
        names = [f"CPU:{i}" for i in range(a.devices)]
        strategy = tf.distribute.MirroredStrategy(names)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model, (x, y) = build(name, a.quick)
        model.optimizer.build(model.trainable_variables)
    for layer in model._flatten_layers():
        if hasattr(layer, "gate_kernel"):  # routing that is about even
            kernel = np.random.default_rng(0).normal(size=layer.gate_kernel.shape)
            kernel /= np.linalg.norm(kernel, axis=-2, keepdims=True)
            layer.gate_kernel.assign(0.1 * kernel)
    rng = np.random.default_rng(0)

    def numbers(shape):
        shape = (a.devices * shape[0], *shape[1:])
        if len(shape) == 2 or shape == y:
            return rng.integers(0, 10, shape).astype("int32")
        return rng.normal(size=shape).astype("float32")

    data = numbers(x), rng.integers(0, 10, (a.devices * y[0], *y[1:])).astype("int32")
    if strategy is None:
        step = tf.function(model.train_step, autograph=False)
        batch = tuple(map(tf.constant, data))
    else:
        dataset = tf.data.Dataset.from_tensor_slices(data).batch(len(data[0]))
        dataset = strategy.experimental_distribute_dataset(dataset)
        batch = next(iter(dataset))
        step = tf.function(
            lambda batch: strategy.run(model.train_step, args=(batch,)), autograph=False
        )
    step(batch)
    tf.config.experimental.reset_memory_stats("CPU:0")
    step(batch)
    allocator = tf.config.experimental.get_memory_info("CPU:0")["peak"]
    asked = statistics.median(profiled(step, batch) for _ in range(3))
    held = [
        local_bytes(variables, a.devices)
        for variables in (model.variables, model.optimizer.variables)
    ]
    peak = asked + sum(held) + sum(array.nbytes for array in data)
    return [n / a.devices for n in held], peak / a.devices, allocator / a.devices


def profiled(step, batch):
    """The most bytes out at once in a step."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        step(batch)
        tf.profiler.experimental.stop()
        return most_asked(folder)


def local_bytes(variables, devices):
    """Bytes of variables on all devices."""
    return sum(
        v.numpy().nbytes * (1 if hasattr(v, "shards") else devices) for v in variables
    )


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
    held, out, most = {}, 0, 0
    for _, kind, stats in sorted(events, key=lambda event: event[0]):
        if kind == "MemoryAllocation":
            held[stats["addr"]] = stats["requested_bytes"]
            out += stats["requested_bytes"]
        else:
            out -= held.pop(stats["addr"], 0)
        most = max(most, out)
    return most


def child(option, name):
    """What a process of its own prints last."""
    command = [sys.executable, __file__, *sys.argv[1:], option, name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main():
    a = parse()
    if a.plan:
        print(json.dumps(plan(a.plan, a)))
        return
    if a.measure:
        import tensorflow as tf

        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * a.devices,
        )
        print(json.dumps(measure(a.measure, a)))
        return
    print(
        f"{a.devices} device(s), MiB of each\n\n| model | weights | plan | optimizer | plan "
        "| peak | plan | allocator's peak |\n|---|---|---|---|---|---|---|---|"
    )
    for name in a.models:
        planned, measured = (child(f"--{part}", name) for part in ("plan", "measure"))
        (weights, slots), peak, allocator = measured
        mebibytes = [
            f"{n / 2**20:,.1f}"
            for n in (
                weights,
                planned[0],
                slots,
                planned[1],
                peak,
                planned[2],
                allocator,
            )
        ]
        mebibytes[5] += f" ({planned[2] / peak - 1:+.1%})"
        print(f"| {name} | " + " | ".join(mebibytes) + " |", flush=True)


if __name__ == "__main__":
    main()
