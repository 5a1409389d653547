"""Checkpoints of a model alone, from several devices and back; conversions on them.

`python -m tests.distribution.tracking_child SETTINGS`: SETTINGS is JSON with `engine`
and `directory`. Prints for each way how far weights and slots are off.
"""

import importlib.util
import json
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_moe
from keras_moe import distribution
from tests.distribution import child


def make(strategy):
    """Mixtures flat and hierarchical, of other weights every time."""
    with child.scope_of(strategy):
        case = child.Case(num_experts=5, use_bias=True)
        groups = child.Case(layer="hierarchical")
        stack = [child.mixture(case, "flat"), child.mixture(groups, "groups")]
        return keras.Sequential([keras.Input((child.WIDTH,)), *stack])


def main():
    settings = json.loads(sys.argv[1])
    child.start(2)
    if settings["engine"] == "dtensor":
        strategy = distribution.DTensorStrategy(distribution.create_mesh(2))
    else:
        strategy = child.strategy_of(2)
    path, found = settings["directory"] + "/checkpoint", []
    for written, read in ((strategy, strategy), (strategy, None), (None, strategy)):
        first, second = make(written), make(read)
        tf.train.Checkpoint(model=first).write(path)
        tf.train.Checkpoint(model=second).read(path).assert_consumed()
        off = apart(first.weights, second.weights)
        with child.scope_of(written):
            optimizer = keras.optimizers.Adam()
            optimizer.build(first.trainable_variables)
            for variable in optimizer.variables[2:]:
                variable.assign(np.full(variable.shape, 0.5, "float32"))
            tf.train.Checkpoint(model=first, optimizer=optimizer).write(path)
        with child.scope_of(read):
            other, third = keras.optimizers.Adam(), make(read)
            status = tf.train.Checkpoint(model=third, optimizer=other).read(path)
            other.build(third.trainable_variables)
            status.assert_consumed()
        off += apart(first.weights, third.weights)
        off += apart(optimizer.variables, other.variables)
        found.append(off)
    found.append(apart(conversions(strategy, path), conversions(None, path)))
    print("RESULT " + json.dumps(found), flush=True)


def conversions(strategy, path):
    """Weights of mixtures that were made from dense layers, mixtures and files."""
    with child.scope_of(strategy):
        keras.utils.set_random_seed(3)
        pair = [keras.layers.Dense(6, "relu"), keras.layers.Dense(child.WIDTH)]
        dense = keras.Sequential([keras.Input((child.WIDTH,)), *pair])
        sparse = keras_moe.upcycle(dense, num_experts=5, k=2, noise=0.1, seed=0)
        pruned = keras_moe.prune_experts(sparse, [4, 0, 2])
        merged = keras_moe.merge_experts(sparse, [[0, 3], [1, 2, 4]])
        models = [sparse, pruned, merged]
        if importlib.util.find_spec("safetensors"):
            import safetensors.numpy

            safetensors.numpy.save_file(published_tensors(), f"{path}.safetensors")
            models.append(keras_moe.conversion.load_switch(f"{path}.safetensors", 0))
    return [weight for model in models for weight in model.weights]


def published_tensors():
    rng, layer = np.random.default_rng(0), "encoder.block.0.layer.1.mlp"
    shapes = {"router.classifier": (5, 6)}
    for e in range(5):
        shapes[f"experts.expert_{e}.wi"] = (4, 6)
        shapes[f"experts.expert_{e}.wo"] = (6, 4)
    return {f"{layer}.{name}.weight": rng.normal(size=s) for name, s in shapes.items()}


def apart(first, second):
    return [
        float(np.max(np.abs(a.numpy() - b.numpy())))
        for a, b in zip(first, second, strict=True)
    ]


if __name__ == "__main__":
    main()
