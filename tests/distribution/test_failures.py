"""A lost worker is an error for the others, and a run goes on from its backup."""

import time

import pytest

from tests.distribution import children

pytestmark = pytest.mark.slow


def run_until_the_first_fails(settings, directory, timeout):
    """What worker 0 printed when worker 1 was lost."""
    directory.mkdir()
    workers = children.start_workers("failure_child", settings, 2, directory)
    try:
        workers[0].wait(timeout)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert "STOPPING" in (directory / "worker_1.txt").read_text()
    return children.result_of((directory / "worker_0.txt").read_text(), "")


def test_a_killed_worker_ends_the_other_and_both_go_on_from_the_backup(tmp_path):
    settings = {"directory": str(tmp_path / "backups")}
    lost = run_until_the_first_fails(
        {**settings, "stop": "kill"}, tmp_path / "killed", timeout=300
    )
    assert lost["seconds"] < 60
    resumed = children.run_workers("failure_child", settings)
    undisturbed = children.run_workers(
        "failure_child", {"directory": str(tmp_path / "other")}
    )
    assert resumed == undisturbed
    assert resumed[0]["weights"]


def test_a_worker_that_does_not_answer_is_an_error_in_time(tmp_path):
    start = time.monotonic()
    settings = {"directory": str(tmp_path / "backups"), "stop": "freeze"}
    lost = run_until_the_first_fails(
        {**settings, "timeout_seconds": 15.0}, tmp_path / "frozen", timeout=300
    )
    assert lost["seconds"] < 60, time.monotonic() - start
