"""The guide's table of leads says what the records say."""

import json
import re
from pathlib import Path

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
    found = [
        (r["arm"], r["results"])
        for r in map(json.loads, lines)
        if r["arm"]["units"] == int(width) and r["arm"]["tokens"] == number(tokens)
    ]
    mixture = min(
        (
            results
            for arm, results in found
            if arm["middle"] == "moe" and results["parameters"] == number(parameters)
        ),
        key=lambda results: results["perplexity"],
    )
    dense = min(
        results["perplexity"]
        for arm, results in found
        if arm["middle"] != "moe"
        and abs(results["operations"] / mixture["operations"] - 1) <= 0.02
    )
    assert f"{100 * (1 - mixture['perplexity'] / dense):.1f}" == lead
    assert int(each) == round(number(tokens) / number(parameters))


def test_every_row_is_read():
    text = (DOCS / "guides" / "when_it_pays.md").read_text()
    assert len(ROWS) == text.count(".jsonl) |") > 4
