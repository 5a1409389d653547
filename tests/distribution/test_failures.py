"""A lost worker is named by the others and by `launch`, and a run goes on exactly.

Every child is ended by a limit of time; none is asserted.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from tests.distribution import children

pytestmark = pytest.mark.slow

# One of the two stands for both in the usual run.
EITHER = [pytest.param(0, marks=pytest.mark.exhaustive), 1]
# Of a start on one busy core, of four epochs, and of the heartbeats of TensorFlow.
TIMEOUT = 500


def launch(folder, logs, workers=2, **settings):
    """The exit status of `launch`, and what each worker and `launch` printed."""
    settings = {
        "folder": str(folder),
        "logs": str(logs),
        "workers": workers,
        **settings,
    }
    command = [sys.executable, "-m", "tests.distribution.launch_child"]
    launcher = subprocess.Popen(
        [*command, json.dumps(settings)],
        cwd=children.ROOT,
        env=children.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group, with the workers, to be ended in any case
    )
    try:
        printed, _ = launcher.communicate(timeout=TIMEOUT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    others = [(logs / f"worker_{i}.log").read_text() for i in range(1, workers)]
    return children.result_of(printed, "")["status"], [printed, *others]


def state_of(printed):
    """What a worker ended with; the line of `launch` comes after that of the chief."""
    lines = [line for line in printed.splitlines() if line.startswith("RESULT {")]
    return children.result_of(lines[0] if lines else printed, "")["state"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    status, printed = launch(folder / "backup", folder / "logs")
    assert status == 0
    first, second = map(state_of, printed)
    assert first == second
    return first


def kept(folder):
    return sorted(path.name for path in folder.glob("*.h5"))


@pytest.mark.parametrize("stopped", EITHER)
def test_a_killed_worker_is_named_and_all_go_on(tmp_path, undisturbed, stopped):
    backup = tmp_path / "backup"
    status, printed = launch(backup, tmp_path / "logs", stop="kill", stopped=stopped)
    assert status == -signal.SIGKILL
    assert f"Worker {stopped} (127.0.0.1:" in printed[0]
    assert "was ended by signal 9 (Killed). Its output is" in printed[0]
    assert f"Worker {stopped} (127.0.0.1:" in printed[1 - stopped]
    assert f"(Worker {1 - stopped} says so.)" in printed[1 - stopped]
    # One newest file is cut: all go on from the epoch before.
    folder = backup / "worker_1" if stopped else backup
    assert kept(folder) == ["epoch_1.weights.h5", "epoch_2.weights.h5"]
    os.truncate(folder / "epoch_2.weights.h5", 5000)
    status, printed = launch(backup, tmp_path / "logs")
    assert status == 0
    assert "epoch_2.weights.h5 is damaged" in printed[stopped]
    assert "going on after 1." in printed[stopped]
    assert [state_of(text) for text in printed] == [undisturbed] * 2


@pytest.mark.parametrize("stopped", EITHER)
def test_a_stopped_worker_is_named_and_ended(tmp_path, undisturbed, stopped):
    backup = tmp_path / "backup"
    status, printed = launch(backup, tmp_path / "logs", stop="freeze", stopped=stopped)
    assert status > 0  # of the one that noticed
    assert f"Worker {stopped} (127.0.0.1:" in printed[0]
    assert "was stopped by a signal and did not answer" in printed[0]
    assert f"(Worker {1 - stopped} says so.)" in printed[1 - stopped]
    status, printed = launch(backup, tmp_path / "logs")
    assert status == 0
    assert [state_of(text) for text in printed] == [undisturbed] * 2


@pytest.mark.exhaustive
def test_the_worker_with_a_full_disk_is_named(tmp_path, undisturbed):
    backup = tmp_path / "backup"
    status, printed = launch(backup, tmp_path / "logs", stop="full", stopped=1)
    assert status == 1
    assert "Worker 1 (127.0.0.1:" in printed[0]
    assert "failed with exit status 1. Its output is in" in printed[0]
    assert "epoch_3.weights.h5 could not be written" in printed[1]
    assert "Free some space on its disk. What stood there" in printed[1]
    assert kept(backup / "worker_1") == ["epoch_1.weights.h5", "epoch_2.weights.h5"]
    status, printed = launch(backup, tmp_path / "logs")
    assert status == 0
    assert [state_of(text) for text in printed] == [undisturbed] * 2


def test_one_process_goes_on_when_its_disk_has_room_again(tmp_path):
    settings = {"folder": str(tmp_path / "full"), "stop": "full", "stopped": 0}
    found = children.run("failure_child", settings, TIMEOUT)
    assert "full/epoch_3.weights.h5 could not be written" in found["error"]
    assert "File too large. Free some space" in found["error"]
    settings = {"folder": str(tmp_path / "undisturbed")}
    assert children.run("failure_child", settings, TIMEOUT)["state"] == found["state"]
