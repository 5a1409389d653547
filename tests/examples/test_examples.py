"""Every example script runs in its `--quick` mode."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
WITH_QUICK = [
    path for path in sorted(EXAMPLES.rglob("*.py")) if '"--quick"' in path.read_text()
]


@pytest.mark.slow
@pytest.mark.parametrize("script", WITH_QUICK, ids=lambda p: p.stem)
def test_quick_mode_runs(script, tmp_path):
    ran = subprocess.run(
        [sys.executable, str(script), "--quick"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip()


def test_there_are_scripts_to_run():
    names = {path.stem for path in WITH_QUICK}
    assert {"balance_losses", "hierarchical_benchmark", "recompute_memory"} <= names
