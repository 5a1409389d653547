"""Collectives of a step have kernels on GPUs, with the data in the GPU's memory."""

import pytest
from tensorflow.python.framework import kernels

# What `test_description` and `test_dtensor` count in a step, and no others.
COLLECTIVES = ["CollectiveAllToAllV2", "CollectiveGatherV2", "CollectiveReduceV2"]
ON_HOST = {"group_size", "group_key", "instance_key"}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_run_on_gpus(name):
    found = kernels.get_registered_kernels_for_op(name).kernel
    # `DEFAULT` is that of every kind of device that has none of its own.
    of_gpus = [each for each in found if each.device_type in ("GPU", "DEFAULT")]
    assert of_gpus, name
    for each in of_gpus:
        assert set(each.host_memory_arg) <= ON_HOST, each
