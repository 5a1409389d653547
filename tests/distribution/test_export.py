"""A model whose experts are sharded exports as one that was never distributed."""

import pytest

from tests.distribution import children

pytestmark = pytest.mark.slow


def test_export_of_sharded_models_equals_keras(tmp_path):
    results = children.run("export_child", {"devices": 3, "directory": str(tmp_path)})
    assert set(results) == {"flat", "hierarchical", "balanced", "language_model"}
    for name, result in results.items():
        assert result["apart"] <= 1e-6, name
        assert result["largest"] > 1e-3, name
        # Every weight once, as plain variables, and an index of up to 4 KiB.
        assert result["bytes"] < 1.05 * result["expected_bytes"] + 4096, name
        assert result["routing_apart"] == 0, name
