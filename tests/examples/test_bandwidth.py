"""The time that a step's weights must take of the memory."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "examples" / "benchmarks"


@pytest.fixture
def bandwidth(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bandwidth

    return bandwidth


@pytest.mark.parametrize(
    ("step", "optimizer", "expected"),
    [
        # 8 bytes of weights; 4 bytes a second read, 2 written, 1 to new pages.
        ("forward", None, 8 / 4),
        # Weights twice, and gradients to new pages.
        ("training", None, 16 / 4 + 8 / 1),
        # ... gradients and weights once more, weights written.
        ("update", "sgd", 32 / 4 + 8 / 2 + 8 / 1),
        ("update", "factored_adam", 32 / 4 + 8 / 2 + 8 / 1),
        # ... and both moments read and written.
        ("update", "adam", 48 / 4 + 24 / 2 + 8 / 1),
    ],
)
def test_least_seconds_count_every_pass_over_the_weights(
    bandwidth, step, optimizer, expected
):
    found = bandwidth.Bandwidth(read=4.0, write=2.0, new_pages=1.0, threads=1)
    assert found.least_seconds(step, 8, optimizer) == pytest.approx(expected)


def test_a_machine_is_measured(bandwidth):
    found = bandwidth.measure(threads=1, quick=True)
    assert min(found) > 0
    assert "1 threads" in str(found)
