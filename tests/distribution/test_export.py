"""A model whose experts are sharded exports as one that was never distributed."""

import pytest

from tests.distribution import children

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "models",
    [
        ["hierarchical", "language_model"],
        pytest.param(["flat", "balanced"], marks=pytest.mark.exhaustive),
    ],
    ids=["1", "2"],
)
def test_export_of_sharded_models_equals_keras(models, tmp_path):
    settings = {"devices": 3, "directory": str(tmp_path), "models": models}
    results = children.run("export_child", settings)
    assert list(results) == models
    for name, result in results.items():
        assert result["apart"] <= 1e-6, name
        assert result["largest"] > 1e-3, name
        # Every weight once, as plain variables, and an index of up to 4 KiB.
        assert result["bytes"] < 1.05 * result["expected_bytes"] + 4096, name
        assert result["routing_apart"] == 0, name


def test_export_keeps_what_adapt_learnt(tmp_path):
    settings = {"devices": 2, "directory": str(tmp_path), "models": ["adapted"]}
    assert children.run("export_child", settings)["adapted"]["apart"] <= 1e-6
