"""The repairs to Keras are still needed. Where a test fails, one can go."""

import pytest
import tensorflow as tf

from keras_moe.distribution import compatibility
from keras_moe.distribution.mirrored import repairs
from tests.distribution import children


def test_nothing_tunes_the_pipelines_that_hand_batches_to_devices(monkeypatch):
    module, name = compatibility.device_iterators, "_create_device_dataset"
    devices, found = ["CPU:0", "CPU:0"], []
    # Stock at first, or what a strategy of an earlier test has repaired.
    stock = getattr(module, name)
    stock = getattr(stock, "__wrapped__", stock)

    def batches(create):
        def noted(*args):
            found.append(create(*args))
            return found[-1]

        monkeypatch.setattr(module, name, noted)
        data = tf.data.Dataset.range(4)
        batches = module.OwnedMultiDeviceIterator(data, devices, source_device="CPU:0")
        return [[int(each) for each in batches.get_next()] for _ in range(2)]

    assert batches(stock) == [[0, 1], [2, 3]]
    tuned = [each.options().autotune.enabled for each in found]
    assert tuned == [None, None], "remove install_untuned_batches"
    found.clear()
    monkeypatch.setattr(module, name, stock)
    repairs.install_untuned_batches()
    assert batches(getattr(module, name)) == [[0, 1], [2, 3]]
    assert [each.options().autotune.enabled for each in found] == [False, False]


@pytest.mark.slow
def test_repairs_of_fit_in_several_processes_are_still_needed():
    for found in children.run_workers("repairs_child", {}):
        # A plain model, first without any repair, then with one, then with both.
        assert found["none"], "remove keras_moe/distribution/mirrored/repairs.py"
        assert found["symbolic_build"], "remove install_reduction"
        assert found["reduction"], "remove install_symbolic_build"
        assert found["both"] == ""
