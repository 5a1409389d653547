import collections
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest

_FOLDER = Path(__file__).parent
_seconds: collections.Counter = collections.Counter()


def pytest_runtest_logreport(report):
    """Sums what tests take by folder; of several processes the first hears of all."""
    parts = report.nodeid.split("::")[0].split("/")
    if _FOLDER.name in parts:
        name = parts[parts.index(_FOLDER.name) + 1]
        _seconds[f"{_FOLDER.name}/{name}"] += report.duration


def pytest_terminal_summary(terminalreporter):
    if _seconds:
        terminalreporter.section("time of each folder of tests")
        for name, seconds in _seconds.most_common():
            terminalreporter.line(f"{seconds:8.1f} s  {name}")
        terminalreporter.line(f"{_seconds.total():8.1f} s  all, over all processes")


@pytest.fixture(autouse=True)
def _clean_keras():
    """Every test starts from the same seed, names and float32 policy."""
    # Without a collection of garbage, which takes seconds once there are many graphs.
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float32")
    keras.utils.set_random_seed(1701)


@pytest.fixture
def rng():
    return np.random.default_rng(6538)
