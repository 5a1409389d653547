"""The runner of the experiments, and their checks on the recorded results."""

import contextlib
import dataclasses
import importlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "docs" / "experiments" / "records.jsonl"
# Three seeds of each.
AGAIN = ROOT / "docs" / "experiments" / "2026-12-01-paper.jsonl"
SCRIPTS = [
    *sorted(path.stem for path in (ROOT / "examples" / "paper").glob("e[0-9]_*.py")),
    "loss_free_balance",
]


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "paper"))


@dataclasses.dataclass(frozen=True)
class Counting:
    """An arm that counts its runs."""

    value: float
    seed: int = 0

    def run(self):
        RUNS.append(self)
        return {"perplexity": self.value}

    def shortened(self):
        return dataclasses.replace(self, value=0.5)


RUNS: list[Counting] = []


def run_experiment(monkeypatch, folder, *arguments):
    """The number of runs so far, after the script has been called."""
    import experiment

    def plan(seed, without):
        return {
            "low": Counting(2.0 if without == "lowness" else 1.0, seed),
            "high": Counting(2.0, seed),
        }

    def check(found):
        low, high = found["low"]["perplexity"], found["high"]["perplexity"]
        return {f"{low} < {high}": low < high}

    records = ["--records", str(folder / "records.jsonl")]
    monkeypatch.setattr(sys, "argv", ["script", *records, *arguments])
    experiment.main(
        "What it is about.",
        plan=plan,
        check=check,
        columns={"perplexity": ".1f"},
        causes={"lowness": "both are high"},
    )
    return len(RUNS)


def test_runs_are_kept_shared_and_never_repeated(monkeypatch, tmp_path, capsys):
    RUNS.clear()
    assert run_experiment(monkeypatch, tmp_path, "--seeds", "0") == 2
    # Another seed is two runs more; what is recorded is not run again.
    assert run_experiment(monkeypatch, tmp_path, "--seeds", "0", "1") == 4
    printed = capsys.readouterr().out
    assert "| 1 | low | 1.0 |" in printed
    assert "ok: seed 1: 1.0 < 2.0" in printed
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == 4
    record = json.loads(lines[0])
    assert record["arm"] == {"kind": "Counting", "value": 1.0, "seed": 0}
    assert record["versions"]["tensorflow"].startswith("2.")
    assert run_experiment(monkeypatch, tmp_path, "--seeds", "0", "--again") == 6


def test_a_check_fails_without_its_cause(monkeypatch, tmp_path, capsys):
    RUNS.clear()
    options = ("--seeds", "0", "--without", "lowness")
    with pytest.raises(SystemExit) as stopped:
        run_experiment(monkeypatch, tmp_path, *options)
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "Without lowness: both are high." in printed
    assert "FAILED: seed 0: 2.0 < 2.0" in printed
    # Both arms are the same now, so one run is enough.
    assert len(RUNS) == 1
    # In a quick run checks count nothing.
    assert run_experiment(monkeypatch, tmp_path, *options, "--quick") == 2


def recorded(script, without, path=RECORDS, seed=0):
    """Whether each check of a script holds, by the committed records; None if missing."""
    experiment = importlib.import_module("experiment")
    module = importlib.import_module(script)
    records = experiment.Records(path)
    found = {}
    for title, arm in module.plan(seed, without).items():
        record = records.known(arm)
        if record is None:
            return None
        found[title] = record["results"]
    return module.check(found)


# Each cause, and how many checks fail without it.
CAUSES = {
    ("e1_capacity", "capacity"): 2,
    ("e2_balancing_losses", "losses"): 5,
    ("e3_balance_on_text", "losses"): 6,
    ("e4_hierarchical", "experts"): 2,
    ("e5_data_size", "data"): 1,
    ("e6_factored_adam", "factors"): 1,
    ("e6_factored_adam", "updates"): 1,
    ("e7_balanced_gating", "balance"): 2,
    ("e8_learned_gating", "learning"): 4,
    ("loss_free_balance", "bias"): 1,
}
# Checks that fail with all causes in place; the record says so, too.
CONTRARY = {"e3_balance_on_text": 1}
EVERYTHING = [*((script, None) for script in SCRIPTS), *CAUSES]


@pytest.mark.parametrize(("script", "cause"), EVERYTHING)
def test_checks_hold_on_the_records_and_fail_without_their_cause(script, cause):
    checks = recorded(script, cause)
    assert checks is not None, "not recorded"
    failed = [text for text, passed in checks.items() if not passed]
    if cause:
        assert len(failed) >= CAUSES[script, cause], failed
    else:
        assert len(failed) == CONTRARY.get(script, 0), failed


# In a document: the table that a script prints of `AGAIN`, between marks.
OUTPUT = re.compile(r"<!-- table of (\w+) -->\n+(.*?)\n+<!-- end of table -->", re.S)
# Checks that fail, of three seeds; the document says so, too.
CONTRARY_AGAIN = {"e2_balancing_losses": 2}
DOCUMENTED = OUTPUT.findall(AGAIN.with_suffix(".md").read_text())


@pytest.mark.parametrize(
    ("script", "table"), DOCUMENTED, ids=[script for script, _ in DOCUMENTED]
)
def test_tables_of_three_seeds_are_what_scripts_print(
    script, table, monkeypatch, capsys, tmp_path
):
    # With what is not recorded it would be trained.
    for seed in range(3):
        assert recorded(script, None, AGAIN, seed) is not None, "not recorded"
    path = shutil.copy(AGAIN, tmp_path)
    arguments = ["--seeds", "0", "1", "2", "--records", str(path)]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    failing = CONTRARY_AGAIN.get(script, 0)
    with pytest.raises(SystemExit) if failing else contextlib.nullcontext():
        runpy.run_path(
            str(ROOT / "examples" / "paper" / f"{script}.py"), run_name="__main__"
        )
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("|")] == table.splitlines()
    verdicts = [line.split(":")[0] for line in printed if ": seed" in line]
    assert len(verdicts) >= 3
    assert verdicts.count("ok") == len(verdicts) - failing


def test_the_document_of_three_seeds_has_their_tables():
    assert len({script for script, _ in DOCUMENTED} & set(SCRIPTS)) == 8


def test_every_cause_of_every_script_is_named_here():
    for script in SCRIPTS:
        text = (ROOT / "examples" / "paper" / f"{script}.py").read_text()
        assert "causes=" in text
        assert script in {name for name, _ in CAUSES}
