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
        pytest.param(FEW, id="few", marks=pytest.mark.exhaustive),
        pytest.param(MIRRORED, id="mirrored", marks=pytest.mark.exhaustive),
        pytest.param(GROUPS, id="groups"),
        pytest.param(ALL_GROUPS, id="all groups", marks=pytest.mark.exhaustive),
        pytest.param(BOTH, id="both", marks=pytest.mark.exhaustive),
    ],
)
def test_training_goes_on_with_other_numbers_of_devices(stages, tmp_path):
    settings = [
        {"engine": engine, "devices": devices}
        | dict(zip(["group_size"], size, strict=False))
        for engine, devices, *size in stages
    ]
    assert_goes_on(settings, tmp_path)


def assert_goes_on(stages, directory):
    found = []
    for stage, settings in enumerate(stages):
        settings = {**settings, "directory": str(directory)}
        settings |= {"stage": stage, "stages": len(stages)}
        found.append(children.run("checkpoint_child", settings))
    (unbroken,) = (each["unbroken"] for each in found if "unbroken" in each)
    # Losses change from step to step, or equal ones would say nothing.
    assert np.min(np.abs(np.diff(np.ravel(unbroken)))) > 1e-3
    for stage, losses in enumerate(unbroken):
        np.testing.assert_allclose(
            found[stage]["losses"], losses, rtol=0, atol=1e-5, err_msg=str(stage)
        )
        # `.weights.h5`, `tf.train.Checkpoint`, `.keras`: as `BackupAndRestore`.
        assert found[stage]["apart"] == [0.0] * (3 if stage else 0)


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(
            [("mirrored", 3, True), (None, 1, True), ("dtensor", 2, True)], id="few"
        ),
        pytest.param(
            [
                ("mirrored", 4, True),
                (None, 1, True),
                ("mirrored", 2, "everywhere"),
                ("dtensor", 4, True),
                ("mirrored", 3, True),
                ("dtensor", 3, True),
            ],
            id="many",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_training_goes_on_wherever_words_are(stages, tmp_path):
    settings = [
        {"engine": engine, "devices": devices, "words": words}
        for engine, devices, words in stages
    ]
    assert_goes_on(settings, tmp_path)


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
