"""Trains one model on one logical device or two, in a process of its own.

`python -m tests.gpu.child SETTINGS`: SETTINGS is JSON with `engine` ("one", "mirrored"
or "dtensor"), `layer` ("flat" or "hierarchical") and `kind` ("GPU", or "CPU" to try the
script). Prints one line of JSON: the loss of each epoch.
"""

import contextlib
import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_moe
from keras_moe import layers

UNITS, BATCH = 16, 24


def start(kind: str) -> list[str]:
    """Makes two logical devices of the first physical one; before TensorFlow starts."""
    memory = {"memory_limit": 2048} if kind == "GPU" else {}
    logical = [tf.config.LogicalDeviceConfiguration(**memory) for _ in range(2)]
    device = tf.config.list_physical_devices(kind)[0]
    tf.config.set_logical_device_configuration(device, logical)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return [f"{kind}:0", f"{kind}:1"]


def scope_of(engine: str, devices: list[str]):
    if engine == "one":
        return contextlib.nullcontext()
    if engine == "mirrored":
        return tf.distribute.MirroredStrategy(devices).scope()
    mesh = keras_moe.distribution.create_mesh(devices=devices)
    return keras_moe.distribution.DTensorStrategy(mesh).scope()


def mixture(layer: str):
    gates = [
        layers.NoisyTopKGating(k=2, gate_initializer="glorot_uniform", seed=seed)
        for seed in (5, 6)
    ]
    experts = layers.FeedForwardExperts(8, 24)
    if layer == "flat":
        return layers.MoE(experts, gates[0])
    return layers.HierarchicalMoE(experts, 4, k=(2, 1), primary_gating=gates[1])


def losses(engine: str, layer: str, devices: list[str]) -> list[float]:
    keras.utils.set_random_seed(0)
    with scope_of(engine, devices):
        parts = [keras.layers.Dense(UNITS, "tanh"), mixture(layer)]
        model = keras.Sequential([keras.Input((UNITS,)), *parts, keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.05), "mse")
    x = np.random.default_rng(0).standard_normal((4 * BATCH, UNITS)).astype("float32")
    y = np.sin(2 * x[:, :1])
    run = model.fit(x, y, batch_size=BATCH, epochs=5, shuffle=False, verbose=0)
    return run.history["loss"]


def main():
    settings = json.loads(sys.argv[1])
    devices = start(settings["kind"])
    found = losses(settings["engine"], settings["layer"], devices)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
