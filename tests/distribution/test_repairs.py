"""The repairs to Keras are still needed. Where a test fails, one can go."""

import pytest

from tests.distribution import children

pytestmark = pytest.mark.slow


def test_repairs_of_fit_in_several_processes_are_still_needed():
    for found in children.run_workers("repairs_child", {}):
        # A plain model, first without any repair, then with one, then with both.
        assert found["none"], "remove keras_moe/distribution/mirrored/repairs.py"
        assert found["symbolic_build"], "remove install_reduction"
        assert found["reduction"], "remove install_symbolic_build"
        assert found["both"] == ""
