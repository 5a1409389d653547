"""Starts the processes of a cluster on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from keras_moe import checks

# How long the other processes may take to end once one has failed.
_GRACE_SECONDS = 60


def launch(
    arguments: Sequence[str], num_workers: int, log_dir: str | os.PathLike
) -> int:
    """Runs a Python program in several processes that form one cluster.

    Each process finds its place in the environment variable `TF_CONFIG`, which
    `tf.distribute.MultiWorkerMirroredStrategy` reads. The first, which is the
    chief, writes to the console; the others to `worker_<number>.log`. If one fails
    the others are ended, also those that are stopped, and standard error says which
    it was: the one that was killed or stopped, not those that noticed.

    Args:
        arguments: Arguments of the Python interpreter: a script or `-m` and a
            module, and what it is given.
        num_workers: Int. Processes, all on this machine.
        log_dir: Folder for the output of all but the first; made if missing.

    Returns:
        The exit status of the first process that failed, else 0.

    Raises:
        ValueError: `num_workers` is below 1, or `arguments` is empty.

    Reference:
        Several hosts need no launcher: set `TF_CONFIG` on each and start the
        program there.
    """
    status, failed = run_workers(arguments, num_workers, log_dir)
    if status:
        print(failed, file=sys.stderr, flush=True)
    return status


def run_workers(
    arguments: Sequence[str], num_workers: int, log_dir: str | os.PathLike
) -> tuple[int, str]:
    """As `launch`, which has the arguments.

    Returns:
        The exit status of the first process that failed, else 0; and which one failed
        and how, in a sentence, or an empty string.

    Raises:
        ValueError: As `launch`.
    """
    num_workers = checks.verify_positive_int(num_workers, "num_workers")
    if not arguments:
        raise ValueError(
            "`arguments` must name a program. Received: arguments=[]. Pass a script, "
            "or -m and a module."
        )
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(num_workers)]
    workers = []
    try:
        for index in range(num_workers):
            workers.append(_start(arguments, addresses, index, log_dir))
        status, index, how = _wait(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if not status:
        return 0, ""
    output = f"in {log_dir / f'worker_{index}.log'}" if index else "above"
    return status, f"Worker {index} ({addresses[index]}) {how}. Its output is {output}."


def _start(arguments, addresses, index, log_dir):
    config = {
        "cluster": {"worker": addresses},
        "task": {"type": "worker", "index": index},
    }
    command = [sys.executable, *arguments]
    environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
    if index == 0:
        return subprocess.Popen(command, env=environment)
    with open(log_dir / f"worker_{index}.log", "w") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT
        )


def _wait(workers):
    """Until all have ended, or one has failed and the others had time to say so.

    Returns the first exit status that is not 0, and the worker that is to blame, with
    how it ended.
    """
    failed_at, status, index, how = None, 0, 0, ""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = {i: code for i, code in enumerate(codes) if code}
        running = [i for i, code in enumerate(codes) if code is None]
        stopped = [i for i in running if _is_stopped(workers[i])] if failed else []
        if failed and failed_at is None:
            failed_at = time.monotonic()
            # One that a signal ended before one that noticed and said so.
            index, status = min(failed.items(), key=lambda item: item[1] > 0)
            how = _ending(status)
            if stopped:
                index, how = stopped[0], "was stopped by a signal and did not answer"
        # Those that are stopped will not say anything.
        if running == stopped:
            return status, index, how
        if failed_at is not None and time.monotonic() - failed_at > _GRACE_SECONDS:
            return status, index, how
        time.sleep(0.2)


def _ending(status):
    if status > 0:
        return f"failed with exit status {status}"
    return f"was ended by signal {-status} ({signal.strsignal(-status)})"


def _is_stopped(worker):
    """Whether a process is stopped (SIGSTOP, say), and not ended."""
    if not hasattr(os, "waitid"):
        return False
    options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
    try:
        return os.waitid(os.P_PID, worker.pid, options) is not None
    except ChildProcessError:
        return False


def _free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
