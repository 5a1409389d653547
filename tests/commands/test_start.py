"""What is set before TensorFlow starts."""

import importlib
import os
import sys

import keras_moe


def test_commands_keep_the_pages_of_large_tensors(monkeypatch):
    settings = "TF_CPU_ALLOCATOR_USE_BFC", "TF_CPU_BFC_MEM_LIMIT_IN_MB"
    for name in settings:
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    importlib.reload(keras_moe)
    assert not any(name in os.environ for name in settings)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "keras_moe", "plan"])
    importlib.reload(keras_moe)
    assert os.environ[settings[0]] == "true"
    assert int(os.environ[settings[1]]) >= 2**20
    monkeypatch.setenv(settings[0], "false")
    importlib.reload(keras_moe)
    assert os.environ[settings[0]] == "false"
