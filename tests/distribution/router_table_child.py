"""Trains a mixture with each gate on one device and on an engine, in a process.

`python -m tests.distribution.router_table_child SETTINGS`: JSON with `devices`, `engine`
and `routers`, see `tests.conformance.router_table`.
"""

import json
import sys

import keras
import numpy as np

from tests.conformance import router_table
from tests.distribution import child, dtensor_child

# Batches of 4, 4 and 1: then a replica has none, and a mesh does not divide it.
ROWS = 9


def weights_after(code, rows, strategy=None):
    keras.utils.clear_session()
    x = router_table.inputs(rows)
    x[np.random.default_rng(1).random(x.shape[:2]) < 0.3] = 0.0  # padding
    with child.scope_of(strategy):
        layer = router_table.mixture(code)
        model = keras.Sequential(
            [keras.Input(x.shape[1:]), keras.layers.Masking(), layer]
        )
    router_table.trained(model, x)
    return [v.numpy() for v in layer.weights if v.name != "step_digest"]


def equals_one_device(code, rows, strategy):
    expected = weights_after(code, rows)
    for a, b in zip(weights_after(code, rows, strategy), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    if settings["engine"] == "dtensor":
        strategy = dtensor_child.strategy_of(settings)
    else:
        strategy = child.strategy_of(settings["devices"])
    found = [
        router_table.is_taken(equals_one_device, code, ROWS, strategy)
        for code in settings["routers"]
    ]
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
