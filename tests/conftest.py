import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _clean_keras():
    """Every test starts from the same seed, names and float32 policy."""
    # Without a collection of garbage, which takes seconds once there are many graphs.
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1701)


@pytest.fixture
def rng():
    return np.random.default_rng(6538)
