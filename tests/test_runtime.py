"""What is set for a while, and what TensorFlow computes by."""

import os
import subprocess
import sys
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


def test_uses_onednn_follows_the_environment():
    here = runtime.uses_onednn()
    script = "from keras_moe import runtime; print(runtime.uses_onednn())"
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": str(int(not here))}
    command = [sys.executable, "-c", script]
    output = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == str(not here)
