"""One of several clients of a mesh, in a process of its own.

`python -m tests.distribution.dtensor_clients_child SETTINGS`: trains each case on the
mesh of all clients and on one device, as `child` does.
"""

import json
import sys

import keras
import tensorflow as tf

from keras_moe import distribution
from tests.distribution import child


def sums_of_weights(strategy, client):
    """Of a model for which each client draws other numbers."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(100 + client)
    with strategy.scope():
        model = child.stack(child.Case())
    return [float(abs(weight).sum()) for weight in model.get_weights()]


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    mesh = distribution.create_mesh(
        settings["devices"],
        expert_parallel_size=settings.get("expert_parallel_size"),
    )
    strategy = distribution.DTensorStrategy(mesh)
    cases = [child.compare(child.Case(**case), strategy) for case in settings["cases"]]
    client = tf.experimental.dtensor.client_id()
    found = {
        "size": mesh.size,
        "cases": cases,
        "sums": sums_of_weights(strategy, client),
    }
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
