"""The table of layers in the guide is what running every cell of it gives."""

import keras
import pytest

from keras_moe import layers, models
from tests.conformance import engine_table, guide_tables
from tests.conformance.descriptors import DESCRIPTORS


def documented():
    """Rows of the table in the guide by layer, as dicts by column."""
    rows = guide_tables.documented("distribution.md", "| layer | `")
    return {row["layer"]: row for row in rows}


def test_every_row_and_column_is_run():
    rows = documented()
    assert [*rows] == [*engine_table.ROWS]
    for row in rows.values():
        assert set(row) == {"layer", *engine_table.COLUMNS}
        assert {row[column] for column in engine_table.COLUMNS} <= {"yes", "no"}


# They stand in a mixture, or in the table of gates.
PARTS_OF_MIXTURES = {layers.FeedForwardExperts, layers.GatedExperts, layers.Experts}
PARTS_OF_MIXTURES |= {layers.ExpertList, layers.HierarchicalGating}


def test_every_public_layer_has_a_row():
    run = {row.of for row in DESCRIPTORS if row.name in engine_table.ROWS.values()}
    public = {getattr(layers, name) for name in layers.__all__}
    public = {
        each
        for each in public | {models.MoELanguageModel, models.MoETranslator}
        if isinstance(each, type) and issubclass(each, keras.layers.Layer)
    }
    gates = {each for each in public if each.__name__.endswith("Gating")}
    assert public - gates - PARTS_OF_MIXTURES <= run


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("part", engine_table.PARTS)
@pytest.mark.parametrize("column", engine_table.COLUMNS)
def test_cells_are_as_documented(column, part):
    names = [*engine_table.PARTS[part]]
    found = engine_table.results(engine_table.COLUMNS[column], names)
    rows = documented()
    for name, result in zip(names, found, strict=True):
        assert engine_table.cell(result) == rows[name][column], (name, result)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("part", engine_table.PARTS)
@pytest.mark.parametrize("num_devices", [1, 3, 4])
@pytest.mark.parametrize("engine", ["mirrored", "mesh"])
def test_every_number_of_devices_trains_as_one(engine, num_devices, part):
    names = [*engine_table.PARTS[part]]
    settings = {"engine": engine, "devices": num_devices}
    for name, result in zip(names, engine_table.results(settings, names), strict=True):
        assert engine_table.cell(result) == "yes", (name, result)
