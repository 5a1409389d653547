"""A training step on several devices against one, with the same global batch.

    python examples/benchmarks/devices_benchmark.py
    python examples/benchmarks/devices_benchmark.py --devices 4 --layer hierarchical
    python examples/benchmarks/devices_benchmark.py --engine dtensor

Parts of one CPU stand for devices: they share its cores, so the ratio is what the
exchange costs, and smaller products, not what more devices gain. `--layer dense` is the
same without a mixture, so without an exchange. Both sides alternate in one run.
"""

import argparse
import contextlib

import keras
import numpy as np
import tensorflow as tf
from alternating import compare

import keras_moe


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--engine", choices=("mirrored", "dtensor"), default="mirrored")
    parser.add_argument(
        "--layer", choices=("flat", "hierarchical", "dense"), default="flat"
    )
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--hidden-units", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--time", type=int, default=32, help="time steps")
    parser.add_argument("--repeat", type=int, default=21, help="pairs of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small, for function only")
    options = parser.parse_args()
    if options.quick:
        options.experts, options.units, options.hidden_units = 8, 16, 16
        options.batch_size, options.time, options.repeat = 8, 4, 2
    return options


def make_middle(options):
    hidden_units = options.hidden_units
    if options.layer == "dense":  # as many products as with 4 experts of a token
        return keras_moe.models.middle_layers(
            "moe_1_wide", units=options.units, hidden_units=hidden_units, k=4
        )
    experts = keras_moe.layers.FeedForwardExperts(options.experts, hidden_units)
    if options.layer == "flat":
        return keras_moe.layers.MoE(experts, activation="sigmoid")
    return keras_moe.layers.HierarchicalMoE(
        experts, num_groups=options.experts // 8 or 1, activation="sigmoid"
    )


def build(options, strategy):
    keras.utils.set_random_seed(options.seed)
    middle = make_middle(options)
    scope = strategy.scope() if strategy else contextlib.nullcontext()
    with scope:
        model = keras_moe.models.MoELanguageModel(1000, options.units, middle=middle)
        model.build((options.batch_size, options.time))
        model.compile(
            "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        model.optimizer.build(model.trainable_variables)
    return model


def make_step(model, strategy, data):
    """A function without arguments that makes one step, and what it returns."""
    if strategy is None:
        step = tf.function(model.train_step)
        batch = next(iter(data))
        return lambda: step(batch)["loss"]
    batch = next(iter(strategy.experimental_distribute_dataset(data)))

    @tf.function(autograph=False)
    def step(batch):
        return strategy.run(model.train_step, args=(batch,))["loss"]

    return lambda: strategy.experimental_local_results(step(batch))[0]


def make_strategy(options):
    if options.engine == "dtensor":
        mesh = keras_moe.distribution.create_mesh(options.devices)
        return keras_moe.distribution.DTensorStrategy(mesh)
    devices = [f"CPU:{i}" for i in range(options.devices)]
    return tf.distribute.MirroredStrategy(devices)


def main():
    options = parse()
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * options.devices,
    )
    strategy = make_strategy(options)
    rng = np.random.default_rng(options.seed)
    tokens = rng.integers(1, 1000, (options.batch_size, options.time)).astype("int32")
    data = tf.data.Dataset.from_tensor_slices((tokens, tokens))
    data = data.batch(options.batch_size)
    print(
        f"{options.engine}, {options.layer}, {options.experts} experts, {options.units} -> "
        f"{options.hidden_units} -> {options.units}, {tokens.size:,} tokens a batch, "
        f"{options.repeat} pairs of steps ...",
        flush=True,
    )
    sides = []
    for each in (strategy, None):
        keras.utils.clear_session()
        sides.append(make_step(build(options, each), each, data))
    medians, quartiles = compare(*sides, (), options.repeat)
    several, one = medians
    print(f"{options.devices} devices {several * 1e3:.0f} ms, one {one * 1e3:.0f} ms")
    print("ratio, quartiles: " + " / ".join(f"{q:.2f}" for q in quartiles))


if __name__ == "__main__":
    main()
