"""Files do not know the number of devices."""

import numpy as np
import pytest

from tests.distribution import children

pytestmark = pytest.mark.slow

FEW = [("mirrored", 2), (None, 1), ("mirrored", 3)]
MIRRORED = [
    ("mirrored", 4),
    (None, 1),
    ("mirrored", 2),
    ("mirrored", 3),
    ("mirrored", 4),
]
GROUPS = [("mirrored", 4, 2), (None, 1), ("mirrored", 2)]
ALL_GROUPS = [*GROUPS, ("mirrored", 3, 1), ("mirrored", 4, 2)]
BOTH = [("dtensor", 4), (None, 1), ("dtensor", 2), ("mirrored", 3), ("dtensor", 4)]


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(FEW, id="few"),
        pytest.param(MIRRORED, id="mirrored", marks=pytest.mark.exhaustive),
        pytest.param(GROUPS, id="groups"),
        pytest.param(ALL_GROUPS, id="all groups", marks=pytest.mark.exhaustive),
        pytest.param(BOTH, id="both", marks=pytest.mark.exhaustive),
    ],
)
def test_training_goes_on_with_other_numbers_of_devices(stages, tmp_path):
    found = []
    for stage, (engine, devices, *size) in enumerate(stages):
        settings = {"engine": engine, "devices": devices, "directory": str(tmp_path)}
        settings |= dict(zip(["group_size"], size, strict=False))
        settings |= {"stage": stage, "stages": len(stages)}
        found.append(children.run("checkpoint_child", settings))
    unbroken = found[stages.index((None, 1))]["unbroken"]
    # Losses change from step to step, or equal ones would say nothing.
    assert np.min(np.abs(np.diff(np.ravel(unbroken)))) > 1e-3
    for stage, losses in enumerate(unbroken):
        np.testing.assert_allclose(
            found[stage]["losses"], losses, rtol=0, atol=1e-5, err_msg=str(stage)
        )
        # `.weights.h5`, `tf.train.Checkpoint`, `.keras`: as `BackupAndRestore`.
        assert found[stage]["apart"] == [0.0] * (3 if stage else 0)


@pytest.mark.parametrize("engine", ["mirrored", "dtensor"])
def test_a_checkpoint_of_the_model_alone_holds_its_experts(engine, tmp_path):
    settings = {"engine": engine, "directory": str(tmp_path)}
    # From two devices to two, to one, and from one to two.
    *checkpoints, conversions = children.run("tracking_child", settings)
    for off in checkpoints:
        assert len(off) > 30
        assert max(off) == 0
    # `upcycle`, `prune_experts` and others make on two devices what they make on one.
    assert len(conversions) >= 18
    assert max(conversions) == 0
