"""Tests that need a GPU, and say so where there is none."""

import pytest
import tensorflow as tf

# Does not start the devices, which a test may still have to set up.
HAS_GPU = bool(tf.config.list_physical_devices("GPU"))


@pytest.fixture(autouse=True)
def _needs_gpu():
    if not HAS_GPU:
        pytest.skip("needs a GPU: TensorFlow sees none on this machine")
