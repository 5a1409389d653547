"""Every example script runs in its `--quick` mode."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
EXPERIMENTS = [
    *sorted((EXAMPLES / "paper").glob("e[0-9]_*.py")),
    EXAMPLES / "paper" / "loss_free_balance.py",
]
WITH_QUICK = [
    path
    for path in sorted(EXAMPLES.rglob("*.py"))
    if '"--quick"' in path.read_text() and path.stem != "experiment"
]
# The others, most of them benchmarks, are left to the exhaustive run.
OFTEN = [
    "classic_mixtures",
    "e1_capacity",
    "layer_benchmark",
    "sweep",
    "upcycling",
]


def _marked(paths):
    rest = pytest.mark.exhaustive
    return [
        path if path.stem in OFTEN else pytest.param(path, marks=rest) for path in paths
    ]


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """Where experiments find the runs of those before."""
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.slow
@pytest.mark.parametrize("script", _marked(WITH_QUICK), ids=lambda p: p.stem)
def test_quick_mode_runs(script, tmp_path):
    assert run_quickly(script, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", _marked(EXPERIMENTS), ids=lambda p: p.stem)
def test_experiments_run(script, shared_folder):
    printed = run_quickly(script, shared_folder)
    assert "| seed | arm |" in printed
    assert "seed 0: " in printed  # a check and what it found


@pytest.mark.slow
@pytest.mark.exhaustive  # one that is cut and goes on is in the usual run
def test_the_sweep_trains_translation_models(tmp_path):
    script = EXAMPLES / "paper" / "sweep.py"
    printed = run_quickly(script, tmp_path, "--task", "translation")
    assert "| mean BLEU (perplexity of all) |" in printed
    assert "Signatures: `BLEU|nrefs:1" in printed


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_bound_of_a_step_is_printed(tmp_path):
    script = EXAMPLES / "benchmarks" / "layer_benchmark.py"
    printed = run_quickly(script, tmp_path, "--bound", "--optimizer", "factored_adam")
    lines = [line.split("|")[1:-1] for line in printed.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    assert [row[:2] for row in rows] == [
        [experts, step]
        for experts in ("4", "8")
        for step in ("forward", "training", "update")
    ]
    for row in rows:
        times = [float(cell) for cell in (row[2], row[3], row[4], row[6])]
        assert times[2] == 0 if row[1] == "forward" else times[2] >= 0
        assert all(time >= 0 for time in times)
        assert float(row[5]) > 0


def run_quickly(script, folder, *options):
    ran = subprocess.run(
        [sys.executable, str(script), "--quick", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.strip()


def test_there_are_scripts_to_run():
    names = {path.stem for path in WITH_QUICK}
    assert {"balance_losses", "hierarchical_benchmark", "recompute_memory"} <= names
    names = [path.stem.split("_")[0] for path in EXPERIMENTS]
    assert names == [*(f"e{i}" for i in range(1, 9)), "loss"]
