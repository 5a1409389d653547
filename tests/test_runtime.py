"""What is set for a while."""

from types import SimpleNamespace

import pytest

from keras_moe import runtime


def test_attributes_are_as_before_also_after_an_error():
    owners = [SimpleNamespace(rate=1, name="a"), SimpleNamespace(rate=2, name="b")]
    with runtime.attribute(iter(owners), "rate", 7):
        assert [owner.rate for owner in owners] == [7, 7]
    assert [owner.rate for owner in owners] == [1, 2]
    with pytest.raises(KeyError), runtime.attribute(owners, "rate", 7):
        raise KeyError
    assert [vars(owner) for owner in owners] == [
        {"rate": 1, "name": "a"},
        {"rate": 2, "name": "b"},
    ]
