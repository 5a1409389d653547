"""Runs `python -m MODULE SETTINGS` and reads the line of results it prints."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent.parent
# Of tests in which three devices stand for any number in the usual run.
SEVERAL_DEVICES = [
    pytest.param(2, marks=pytest.mark.exhaustive),
    3,
    pytest.param(4, marks=pytest.mark.exhaustive),
]

ADAM = {"optimizer": "Adam", "options": {"learning_rate": 0.01}}


def cases(usual: list[dict], others: list[dict]):
    """Gives a test its `cases`: some in the usual run, the others in the exhaustive one."""
    rest = pytest.param(others, marks=pytest.mark.exhaustive, id="others")
    return pytest.mark.parametrize("cases", [pytest.param(usual, id="usual"), rest])


def environment(**variables: str) -> dict[str, str]:
    """That of a child: this package first, no GPU, little to say."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "CUDA_VISIBLE_DEVICES": "",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **variables,
    }


# Children are forked from a process that has imported TensorFlow, and done nothing with it.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__, "tests.distribution.child"])


def run(module: str, settings: dict, timeout: float = 400):
    """What the child printed after `RESULT`, parsed."""
    return _run([{}], module, settings, timeout)[0]


def _run(processes: list[dict[str, str]], module: str, settings: dict, timeout: float):
    """Results of children, each with environment variables of its own."""
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name, f"{index}.txt") for index in range(len(processes))]
        for output in outputs:
            output.touch()  # a child may fail before it writes
        children = [
            _FORKS.Process(
                target=_child, args=(module, settings, variables, output), daemon=True
            )
            for variables, output in zip(processes, outputs, strict=True)
        ]
        # The forking process inherits it.
        with mock.patch.dict(os.environ, environment()):
            for child in children:
                child.start()
        end = time.monotonic() + timeout
        try:
            for child in children:
                child.join(max(end - time.monotonic(), 1))
            late = [child.exitcode is None for child in children]
        finally:
            for child in children:
                child.kill()
        if any(late):
            said = [output.read_text(errors="replace")[-2000:] for output in outputs]
            raise TimeoutError(f"{module} has not ended after {timeout} s: {said}")
        return [result_of(output.read_text(errors="replace"), "") for output in outputs]


def _child(module: str, settings: dict, variables: dict[str, str], output: Path):
    """Runs a module as `python -m` would."""
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    os.chdir(ROOT)
    os.environ.update(variables)
    sys.argv = [module, json.dumps(settings)]
    runpy.run_module(f"tests.distribution.{module}", run_name="__main__")


def workers_of(hosts: list[str]) -> list[dict[str, str]]:
    """What tells each process of `MultiWorkerMirroredStrategy` who it is."""
    cluster = {"worker": hosts}
    tasks = [{"type": "worker", "index": i} for i in range(len(hosts))]
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": t})} for t in tasks]


def clients_of(hosts: list[str]) -> list[dict[str, str]]:
    """What tells each client of DTensor who it is."""
    common = {
        "DTENSOR_JOBS": ",".join(hosts),
        "DTENSOR_NUM_CLIENTS": str(len(hosts)),
        "DTENSOR_JOB_NAME": "worker",
    }
    return [{**common, "DTENSOR_CLIENT_ID": str(i)} for i in range(len(hosts))]


def free_ports(count: int) -> list[int]:
    """Ports that no process listens on just now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_workers(
    module: str, settings: dict, num_workers=2, timeout: float = 500, who=workers_of
):
    """What each process of a cluster printed after `RESULT`, parsed."""
    hosts = [f"127.0.0.1:{port}" for port in free_ports(num_workers)]
    return _run(who(hosts), module, settings, timeout)


def result_of(stdout: str, stderr: str):
    lines = [line for line in stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (stdout + stderr)[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))
