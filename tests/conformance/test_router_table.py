"""The table of gates in the guide is what running every cell of it gives."""

import re
from pathlib import Path

import pytest

from keras_moe import layers
from tests.conformance import router_table

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guides" / "gating.md"


def documented():
    """Rows of the table in the guide, as dicts by column."""
    lines = GUIDE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| gate | one"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return [dict(zip(head, row, strict=True)) for row in body]


def test_every_gate_has_a_row():
    assert [row["gate"] for row in documented()] == [
        router_table.name_of(code) for code in router_table.ROUTERS
    ]
    named = set(re.findall(r"\w+Gating", " ".join(router_table.ROUTERS)))
    public = {name for name in layers.__all__ if name.endswith("Gating")}
    assert named == public - {"HierarchicalGating"}  # that of `HierarchicalMoE`


def test_every_column_is_run():
    columns = {"gate", *router_table.HERE, *router_table.ELSEWHERE}
    assert set(documented()[0]) == columns


MARKS = {
    "masks": pytest.mark.slow,
    "`capacity_factor`": pytest.mark.slow,
    "`MoELSTM`": pytest.mark.slow,
    "`MirroredStrategy`": pytest.mark.slow,
    "mesh": pytest.mark.slow,
}
REST = (pytest.mark.slow, pytest.mark.exhaustive)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "column",
    [
        pytest.param(column, marks=MARKS.get(column, REST))
        for column in (*router_table.HERE, *router_table.ELSEWHERE)
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_cells_are_as_documented(column):
    found = ["yes" if cell else "no" for cell in router_table.cells(column)]
    assert found == [row[column] for row in documented()]
