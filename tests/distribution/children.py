"""Runs `python -m MODULE SETTINGS` and reads the line of results it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


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


def result_of(stdout: str, stderr: str):
    lines = [line for line in stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, (stdout + stderr)[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))
