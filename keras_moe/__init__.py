"""Mixture-of-Experts layers for TensorFlow 2 and Keras 3."""

from keras_moe import (
    data,
    functional,
    layers,
    models,
    optimizers,
    serving,
    telemetry,
    types,
)
from keras_moe._version import __version__

__all__ = [
    "__version__",
    "data",
    "functional",
    "layers",
    "models",
    "optimizers",
    "serving",
    "telemetry",
    "types",
]
