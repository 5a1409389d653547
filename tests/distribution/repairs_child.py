"""Fits a model without experts in one of several processes, repaired or not."""

import json

import keras
import numpy as np
import tensorflow as tf

from keras_moe.distribution import compatibility
from keras_moe.distribution.mirrored import repairs
from tests.distribution import child


def error_of_fit(strategy):
    """What `fit` raises for a model that knows nothing of this package."""
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(2)])
        model.compile("sgd", "mse")
    data = tf.data.Dataset.from_tensor_slices((np.ones((8, 3)), np.ones((8, 2))))
    try:
        model.fit(data.batch(4), verbose=0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300] or "an error"
    return ""


def main():
    child.start(1)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    kind, module = compatibility.TensorFlowTrainer, compatibility.trainer_module
    stock = kind._maybe_symbolic_build, module.reduce_per_replica
    found = {}
    for name, installs in (
        ("none", []),
        ("symbolic_build", [repairs.install_symbolic_build]),
        ("reduction", [repairs.install_reduction]),
        ("both", [repairs.install_symbolic_build, repairs.install_reduction]),
    ):
        kind._maybe_symbolic_build, module.reduce_per_replica = stock
        for install in installs:
            install()
        found[name] = error_of_fit(strategy)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
