"""The runner of the experiments, and their checks on the recorded results."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
RECORDS = ROOT / "docs" / "experiments" / "records.jsonl"
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


def recorded(script, without):
    """Whether each check of a script holds, by the committed records; None if missing."""
    experiment = importlib.import_module("experiment")
    module = importlib.import_module(script)
    records = experiment.Records(RECORDS)
    found = {}
    for title, arm in module.plan(0, without).items():
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


def test_every_cause_of_every_script_is_named_here():
    for script in SCRIPTS:
        text = (ROOT / "examples" / "paper" / f"{script}.py").read_text()
        assert "causes=" in text
        assert script in {name for name, _ in CAUSES}


@pytest.fixture
def arm_of_the_sweep():
    import sweep

    return sweep.LanguageModelArm(
        tokens=3_000,
        vocabulary_size=200,
        units=16,
        hidden_units=16,
        num_experts=8,
        batch_size=8,
        num_sampled=None,  # TensorFlow's sampler begins anew in another process
        points=3,
        validation_tokens=1_100,
        test_tokens=1_100,
    )


@pytest.mark.slow
def test_an_arm_of_the_sweep_goes_on_where_it_was_cut(
    arm_of_the_sweep, monkeypatch, tmp_path
):
    import sweep

    corpus = sweep.data.load_text_corpus(vocabulary_size=200)
    whole = arm_of_the_sweep.run(tmp_path / "whole", corpus, with_test=True)
    assert [p["tokens"] for p in whole["curve"]] == [1_024, 1_792, 2_816]
    evaluate = sweep.evaluate

    def cut(model, tokens, corpus):
        if sweep.runs.checkpoints(tmp_path / "cut"):
            raise KeyboardInterrupt
        return evaluate(model, tokens, corpus)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "evaluate", cut)
        with pytest.raises(KeyboardInterrupt):
            arm_of_the_sweep.run(tmp_path / "cut", corpus, with_test=True)
    again = arm_of_the_sweep.run(tmp_path / "cut", corpus, with_test=True)
    for name in ("perplexity", "test_perplexity"):
        assert again[name] == pytest.approx(whole[name], rel=1e-5)
    for mine, other in zip(again["curve"], whole["curve"], strict=True):
        assert mine["tokens"] == other["tokens"]
        assert mine["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)


def test_twins_of_the_sweep_have_equal_operations():
    import sweep

    for name in ("moe_4", "moe_64", "moe_256", "hierarchical_256"):
        mixture = sweep.arm_of(name, {})
        for kind in ("dense", "deep"):
            dense = sweep.twin(mixture, kind)
            wanted = mixture.count().core_operations
            assert dense.count().core_operations == pytest.approx(wanted, rel=0.005)
    # 2 LSTMs of 8 d^2, k experts of 2 d h, a gate with noise of 2 d E.
    assert sweep.arm_of("moe_64", {}).count().core_operations == (
        2 * 8 * 128**2 + 4 * 2 * 128 * 256 + 2 * 128 * 64
    )
    curves = [np.array([10, 20, 30])] * 2
    for values, expected in (
        ([3, 1, 1], "20"),
        ([1, 3, 3], "never"),
        ([1, 1, 1], "10"),
    ):
        other = curves[0], np.array([2, 2, 2])
        assert sweep.overtaking((curves[0], np.array(values)), other) == expected
