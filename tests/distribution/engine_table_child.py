"""Trains every layer of a table on one device and on an engine, in a process of its own.

`python -m tests.distribution.engine_table_child SETTINGS`: JSON with `rows`, `engine`,
`devices` and, in groups, `expert_parallel_size`; see
`tests.conformance.engine_table`. With `TF_CONFIG` the process is one of several.
"""

import json
import sys
from functools import partial

import keras
import numpy as np

from keras_moe import layers
from tests.conformance.descriptors import DESCRIPTORS, Descriptor
from tests.distribution import child, dtensor_child

# 10 times batches of 8 and 5: 20 steps, every other of a batch that does not divide.
EXAMPLES, BATCH, EPOCHS = 13, 8, 10


def _mixture_of_layers(**kwargs):
    # Without random numbers, which a mesh draws for empty slots too.
    experts = [keras.layers.Dense(4, kind) for kind in ("tanh", "relu", "silu")]
    return layers.MoE(layers.ExpertList(experts), layers.TopKGating(k=2), **kwargs)


def _mixture_beside_shared_experts(**kwargs):
    # Without dropout, which of Keras' is another on replicas.
    shared = keras.Sequential([keras.layers.Dense(5, "silu"), keras.layers.Dense(4)])
    experts = layers.GatedExperts(6, hidden_units=8)
    return layers.MoE(experts, child.noisy_gate(), shared_experts=shared, **kwargs)


OF_LAYERS = Descriptor(
    "MoE of an ExpertList", _mixture_of_layers, (3, 5, 4), layers.ExpertList
)
SHARED = Descriptor(
    "MoE with shared experts", _mixture_beside_shared_experts, (3, 5, 4), layers.MoE
)
ROWS = {row.name: row for row in (*DESCRIPTORS, OF_LAYERS, SHARED)}

# 1e-7 on the first weights of this model grows to 0.02 in 20 steps of 0.1, on one device:
# its first embeddings are small, and a normalization magnifies them.
CALM = {"MoETransformerLanguageModel": 0.01}


def model_of(row):
    dtype = "int32" if row.integer_inputs else "float32"
    inputs = keras.Input(row.shape[1:], dtype=dtype)
    return keras.Model(inputs, row.result(row.make(name="layer")(inputs)))


def trained(row, strategy=None):
    """Losses of all epochs; weights before and after."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    with child.scope_of(strategy):
        model = model_of(row)
        rate = CALM.get(row.name, 0.1)
        model.compile(keras.optimizers.SGD(rate), "mse")
    before, x = child.state_of(model), row.inputs(EXAMPLES)
    shape = (EXAMPLES, *model.output_shape[1:])
    if None in shape:
        shape = model(x).shape
    y = np.random.default_rng(1).normal(size=shape).astype("float32")
    fit = model.fit(x, y, BATCH, EPOCHS, verbose=0, shuffle=False)
    return fit.history["loss"], before, child.state_of(model)


def compare(row, strategy):
    """How far the ends are apart, or why it is refused."""
    try:
        losses, start, end = trained(row, strategy)
    except ValueError as error:
        return {"refused": str(error)}
    expected, before, after = trained(row)
    apart, where = child.difference(after, end)
    return {
        "start": child.difference(before, start)[0],
        "losses": float(np.max(np.abs(np.subtract(losses, expected)))),
        "weights": apart,
        "where": where,
        "moved": child.difference(before, after)[0],
    }


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    size = settings.get("expert_parallel_size")
    make = partial(child.strategy_of, settings["devices"], size)
    if settings["engine"] == "mesh":
        make = partial(dtensor_child.strategy_of, settings)
    strategy, found = None, {}
    for name in settings["rows"]:
        # Where it can be made anew: a layer must not depend on those before it.
        if strategy is None or settings["engine"] == "mirrored":
            strategy = make()
        found[name] = compare(ROWS[name], strategy)
        print(name, found[name], file=sys.stderr, flush=True)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
