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


def weights_after(code, strategy=None):
    keras.utils.clear_session()
    with child.scope_of(strategy):
        model = router_table.model_of(code)
    router_table.trained(model)
    layer = model.get_layer("moe")
    return [v.numpy() for v in layer.weights if v.name != "step_digest"]


def equals_one_device(code, strategy):
    expected = weights_after(code)
    for a, b in zip(weights_after(code, strategy), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    make = dtensor_child if settings["engine"] == "dtensor" else child
    strategy = make.strategy_of(settings["devices"])
    found = [
        router_table.is_taken(equals_one_device, code, strategy)
        for code in settings["routers"]
    ]
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
