"""Runs `python -m MODULE SETTINGS` and reads the line of results it prints."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Of tests in which three devices stand for any number in the usual run.
SEVERAL_DEVICES = [
    pytest.param(2, marks=pytest.mark.exhaustive),
    3,
    pytest.param(4, marks=pytest.mark.exhaustive),
]

# Its epsilon is far above what sums in another order leave of a gradient that is zero.
# The usual one is not: the step is then rounding divided by rounding, and as large.
ADAM = {"optimizer": "Adam", "options": {"learning_rate": 0.01, "epsilon": 1e-5}}


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


def run(module: str, settings: dict, timeout: float = 400):
    """What the child printed after `RESULT`, parsed."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.distribution.{module}", json.dumps(settings)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return result_of(done.stdout, done.stderr)


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


def start_workers(
    module: str,
    settings: dict,
    num_workers: int = 2,
    directory: Path | None = None,
    who=workers_of,
) -> list[subprocess.Popen]:
    """Starts the processes of a cluster on loopback, output to files."""
    hosts = [f"127.0.0.1:{port}" for port in free_ports(num_workers)]
    workers = []
    for index, variables in enumerate(who(hosts)):
        output = subprocess.PIPE
        if directory is not None:
            output = open(directory / f"worker_{index}.txt", "w")  # noqa: SIM115
        workers.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    f"tests.distribution.{module}",
                    json.dumps(settings),
                ],
                cwd=ROOT,
                env=environment(**variables),
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return workers


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
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        workers = start_workers(module, settings, num_workers, directory, who)
        end = time.monotonic() + timeout
        try:
            for worker in workers:
                worker.wait(max(end - time.monotonic(), 1))
        finally:
            for worker in workers:
                worker.kill()
        outputs = [
            (directory / f"worker_{index}.txt").read_text()
            for index in range(num_workers)
        ]
    return [result_of(output, "") for output in outputs]


def result_of(stdout: str, stderr: str):
    lines = [line for line in stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (stdout + stderr)[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))
