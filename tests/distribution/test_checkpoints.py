"""Files do not know the number of devices."""

import numpy as np
import pytest

from tests.distribution import children

pytestmark = pytest.mark.slow

DEVICES = [4, 1, 2, 3, 4]


def test_training_goes_on_with_other_numbers_of_devices(tmp_path):
    found = []
    for stage, devices in enumerate(DEVICES):
        settings = {"devices": devices, "stage": stage, "stages": len(DEVICES)}
        found.append(
            children.run("checkpoint_child", {**settings, "directory": str(tmp_path)})
        )
    unbroken = found[DEVICES.index(1)]["unbroken"]
    # Losses change from step to step, or equal ones would say nothing.
    assert np.min(np.abs(np.diff(np.ravel(unbroken)))) > 1e-3
    for stage, losses in enumerate(unbroken):
        np.testing.assert_allclose(
            found[stage]["losses"], losses, rtol=0, atol=1e-5, err_msg=str(stage)
        )
        # `.weights.h5`, `tf.train.Checkpoint`, `.keras`: as `BackupAndRestore`.
        assert found[stage]["apart"] == [0.0] * (3 if stage else 0)
