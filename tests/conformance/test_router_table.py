"""The table of gates in the guide is what running every cell of it gives."""

import re

import pytest

from keras_moe import layers
from tests.conformance import guide_tables, router_table


def documented():
    return guide_tables.documented("gating.md", "| gate | one")


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
