"""Mixture-of-Experts layers for TensorFlow 2 and Keras 3."""

import os as _os
import sys as _sys

if _sys.orig_argv[1:3] == ["-m", "keras_moe"]:
    # This package is imported before its own `__main__`: only here can the
    # command line keep TensorFlow's start-up notes off the screen.
    _os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Large tensors of a step get the memory of the step before, not new pages. The limit
    # would be 64 GiB, whatever the machine has.
    _os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
    _os.environ.setdefault("TF_CPU_BFC_MEM_LIMIT_IN_MB", str(2**24))

from keras_moe import (
    conversion,
    data,
    distribution,
    functional,
    layers,
    losses,
    models,
    optimizers,
    planning,
    serving,
    telemetry,
    types,
)
from keras_moe._version import __version__
from keras_moe.conversion import merge_experts, prune_experts, upcycle

__all__ = [
    "__version__",
    "conversion",
    "data",
    "distribution",
    "functional",
    "layers",
    "losses",
    "merge_experts",
    "models",
    "optimizers",
    "planning",
    "prune_experts",
    "serving",
    "telemetry",
    "types",
    "upcycle",
]
