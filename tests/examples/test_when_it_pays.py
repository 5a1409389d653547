"""The guide's table of leads says what the records say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"
ROW = re.compile(
    r"\| \[[\w-]+\]\((\S+\.jsonl)\) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| (\d+) \| (\S+)% \|"
)
ROWS = ROW.findall((DOCS / "guides" / "when_it_pays.md").read_text())


def number(text):
    return int(text.replace(",", ""))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: Path(row[0]).stem)
def test_leads_are_those_of_the_records(row):
    path, width, parameters, tokens, each, lead = row
    lines = (DOCS / "guides" / path).resolve().read_text().splitlines()
    runs = {}
    for arm, results in ((r["arm"], r["results"]) for r in map(json.loads, lines)):
        if arm["units"] == int(width) and arm["tokens"] == number(tokens):
            settings = json.dumps({**arm, "seed": None}, sort_keys=True)
            kind = arm["middle"] == "moe", results["parameters"], results["operations"]
            runs.setdefault((*kind, settings), []).append(results["perplexity"])
    # Of settings with as many seeds, those of the lowest mean.
    order = sorted(runs, key=lambda run: (-len(runs[run]), np.mean(runs[run])))
    mixture = next(run for run in order if run[:2] == (True, number(parameters)))
    dense = next(
        run for run in order if not run[0] and abs(run[2] / mixture[2] - 1) <= 0.02
    )
    found = 100 * (1 - np.mean(runs[mixture]) / np.mean(runs[dense]))
    assert f"{found:.1f}" == lead
    assert int(each) == round(number(tokens) / number(parameters))


def test_every_row_is_read():
    text = (DOCS / "guides" / "when_it_pays.md").read_text()
    assert len(ROWS) == text.count(".jsonl) |") > 4
