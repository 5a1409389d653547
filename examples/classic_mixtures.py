"""Classic mixtures on tabular data: a gate with inputs of its own, experts of two tasks.

    python examples/classic_mixtures.py

1. Adaptive mixtures (Jacobs et al. 1991). What a row's features are worth depends on its
   region. The gate sees the region, the experts see the features; the dense network sees
   both, at as many operations.
2. Multi-gate mixtures (Ma et al. 2018, section 3). Two tasks whose targets are related
   closely or loosely. Both learn from the same experts, each by a gate of its own; the
   dense model has one hidden layer, as wide as all experts, that the tasks share.

The data are drawn here. The table shows the mean squared error of rows that were not
trained on, over the variance of the target: 1 is as good as the mean, 0 is exact.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from keras_moe import layers

tf.get_logger().setLevel("ERROR")  # a model after the other is no retracing

REGIONS, FEATURES = 12, 8
EXPERTS, HIDDEN = 8, 16
TASK_FEATURES, TASK_HIDDEN = 100, 32


def train(model, inputs, targets, options):
    """Error over variance of each target, on the last fifth of the rows."""
    split = len(targets[0]) * 4 // 5
    cut = keras.tree.map_structure
    model.compile(
        keras.optimizers.Adam(options.learning_rate), ["mse"] * len(model.outputs)
    )
    model.fit(
        cut(lambda x: x[:split], inputs),
        [y[:split] for y in targets],
        batch_size=256,
        epochs=options.epochs,
        verbose=0,
    )
    found = model.predict(cut(lambda x: x[split:], inputs), batch_size=1024, verbose=0)
    found = found if isinstance(found, list) else [found]
    return [
        float(np.mean((y[split:] - f[:, 0]) ** 2) / np.var(y[split:]))
        for y, f in zip(targets, found, strict=True)
    ]


def regions(rng, rows):
    """Features, the region of each row as one of `REGIONS` bits, and the target."""
    x = rng.normal(size=(rows, FEATURES)).astype("float32")
    region = rng.integers(REGIONS, size=rows)
    worth = rng.normal(size=(REGIONS, FEATURES))
    y = np.tanh(x) * 2 + x**2 / 2
    y = np.sum(y * worth[region], axis=1) + 0.1 * rng.normal(size=rows)
    return [x, np.eye(REGIONS, dtype="float32")[region]], y.astype("float32")


def adaptive_mixture():
    features, region = keras.Input((FEATURES,)), keras.Input((REGIONS,))
    mixture = layers.MoE(
        layers.FeedForwardExperts(REGIONS, 4 * HIDDEN, output_units=1, use_bias=True),
        layers.NoisyTopKGating(k=2),
        importance_loss_weight=0.01,
        load_loss_weight=0.01,
    )
    return keras.Model([features, region], mixture(features, gate_inputs=region))


def dense_of_regions():
    features, region = keras.Input((FEATURES,)), keras.Input((REGIONS,))
    x = keras.layers.Concatenate()([features, region])
    x = keras.layers.Dense(2 * 4 * HIDDEN, "relu")(x)
    return keras.Model([features, region], keras.layers.Dense(1)(x))


def two_tasks(rng, rows, correlation):
    """Inputs and two targets whose weights have this cosine."""
    first, second = np.linalg.qr(rng.normal(size=(TASK_FEATURES, 2)))[0].T
    second = correlation * first + np.sqrt(1 - correlation**2) * second
    x = rng.normal(size=(rows, TASK_FEATURES)).astype("float32")
    targets = []
    for weights in (first, second):
        score = x @ weights
        # Equations 3 and 4 of Ma et al.: a line and a few waves.
        waves = sum(np.sin(a * score + b) for a, b in ((1.0, 0.0), (2.0, 0.5)))
        noise = 0.1 * rng.normal(size=rows)
        targets.append((score + waves + noise).astype("float32"))
    return x, targets


def towers(shared):
    """A small network of its own for each task, on what it is given."""
    return [
        keras.layers.Dense(1)(keras.layers.Dense(16, "relu")(each)) for each in shared
    ]


def multi_gate():
    x = keras.Input((TASK_FEATURES,))
    experts = layers.FeedForwardExperts(
        EXPERTS, TASK_HIDDEN, output_units=TASK_HIDDEN, use_bias=True
    )
    return keras.Model(x, towers(layers.MultiGateMoE(experts, gatings=2)(x)))


def shared_bottom():
    x = keras.Input((TASK_FEATURES,))
    shared = keras.layers.Dense(EXPERTS * TASK_HIDDEN, "relu")(x)
    shared = keras.layers.Dense(TASK_HIDDEN, "relu")(shared)
    return keras.Model(x, towers([shared, shared]))


def report(name, seeds_errors):
    """A row: mean over the seeds for each target, and how far seeds lie apart."""
    errors = np.array(seeds_errors)
    cells = [f"{m:.3f}" for m in errors.mean(axis=0)]
    apart = f"{np.ptp(errors.mean(axis=1)):.3f}"
    print("| " + " | ".join([name, *cells, apart]) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.epochs, options.seeds = 500, 1, [0]

    def errors(build, draw):
        found = []
        for seed in options.seeds:
            inputs, targets = draw(np.random.default_rng(seed))
            keras.utils.set_random_seed(seed)
            found.append(train(build(), inputs, targets, options))
        return found

    def draw_regions(rng):
        inputs, y = regions(rng, options.rows)
        return inputs, [y]

    print("1. What features are worth depends on the region.\n")
    print("| model | error / variance | between seeds |\n|---|---|---|")
    report("dense, equal operations", errors(dense_of_regions, draw_regions))
    report("mixture, the gate sees the region", errors(adaptive_mixture, draw_regions))
    for correlation in (0.9, 0.3):
        print(f"\n2. Two tasks, weights of cosine {correlation}.\n")
        print("| model | first task | second task | between seeds |\n|---|---|---|---|")

        def draw_tasks(rng, correlation=correlation):
            return two_tasks(rng, options.rows, correlation)

        report("shared hidden layer", errors(shared_bottom, draw_tasks))
        report("experts and two gates", errors(multi_gate, draw_tasks))


if __name__ == "__main__":
    main()
