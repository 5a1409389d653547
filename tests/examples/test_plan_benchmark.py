"""What the benchmark of plans takes for the most that is out at once."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "examples" / "benchmarks"


@pytest.fixture
def most_out(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import plan_benchmark

    return plan_benchmark.most_out


def test_what_was_there_before_can_be_given_back(most_out):
    # A new buffer of 100 bytes becomes that of a variable, whose old one goes: from
    # then on there is as much as at the start, and 60 more are no more than 60.
    replaced = [(True, 2, 100), (False, 1, 100)]
    assert most_out(replaced) == 100
    assert most_out([*replaced, (True, 3, 60), (False, 3, 60)]) == 100
    assert most_out([*replaced, (True, 3, 160)]) == 160


def test_an_address_can_be_lent_out_again(most_out):
    events = [
        (True, 1, 10),
        (False, 1, 10),
        (True, 1, 30),
        (True, 2, 5),
        (False, 1, 30),
    ]
    assert most_out(events) == 35
    assert most_out([]) == 0
