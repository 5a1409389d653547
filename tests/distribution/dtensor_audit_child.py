"""What travels between the devices of a mesh in a training step, and planted faults."""

import collections
import functools
import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor
from tensorflow.python.eager import context

from keras_moe import distribution, engine
from keras_moe.distribution.dtensor import mesh as dtensor_mesh
from tests.distribution import child


def lowered_functions(settings):
    """Collectives of a step after DTensor has expanded it, function by function."""
    os.environ["LOWER_DTENSOR_GATHER_TO_COLLECTIVE_GATHER_V2"] = "1"
    mesh = distribution.create_mesh(
        settings["devices"],
        expert_parallel_size=settings.get("expert_parallel_size"),
    )
    strategy = distribution.DTensorStrategy(mesh)
    before = set(context.context().list_function_names())
    case = child.Case(num_experts=8, optimizer="Adam")
    model = child.build(case, strategy)
    child.train(model, case, 1)
    found, sums = collections.Counter(), []
    branches, group_sizes, sums_of_copies = [], [], []
    for name in context.context().list_function_names():
        definition = context.context().get_function_def(name)
        if name in before or any(n.op == "Relayout" for n in definition.node_def):
            continue  # of the trials of the strategy, or not expanded
        own = collections.Counter(
            node.op for node in definition.node_def if node.op.startswith("Collective")
        )
        found += own
        if own["CollectiveAllToAllV2"]:
            branches.append(own["CollectiveAllToAllV2"])
            nodes = [n for n in definition.node_def if n.op == "CollectiveAllToAllV2"]
            group_sizes += _group_sizes(definition, nodes)
        if "moe" not in name and len(definition.node_def) < 500:
            continue
        for node in definition.node_def:
            if node.op == "CollectiveReduceV2":
                (shape,) = node.attr["_output_shapes"].list.shape
                sums.append([dim.size for dim in shape.dim])
                if len(shape.dim) == 3:
                    sums_of_copies += _group_sizes(definition, [node])
    experts = [v for v in model.trainable_variables if hasattr(v, "mesh")]
    return {
        "collectives": found,
        "branches": branches,
        "group_sizes": sorted(set(group_sizes)),
        "sums_of_copies": sums_of_copies,
        "sums": sums,
        "dense": [
            list(v.shape) for v in model.trainable_variables if not hasattr(v, "mesh")
        ],
        "parts": [
            [list(part.shape) for part in _parts(v)]
            for v in [*experts, *(s for s in model.optimizer.variables if _is_slot(s))]
        ],
        "copies_apart": max(_copies_apart(v) for v in experts),
        "expert_bytes": {
            kind: sum(
                each.device_bytes
                for each in distribution.describe(model).variables
                if each.kind == kind and "experts" in each.path
            )
            for kind in ("weight", "optimizer")
        },
    }


def _group_sizes(definition, collectives):
    """How many devices take part in each of some collectives of a function."""
    constants = {
        node.name: tf.make_ndarray(node.attr["value"].tensor)
        for node in definition.node_def
        if node.op == "Const"
    }
    return [int(constants[node.input[1].split(":")[0]]) for node in collectives]


def _copies_apart(variable):
    """Largest difference between the copies of an expert on different devices."""
    parts = [part.numpy() for part in _parts(variable)]
    size = len(parts) // variable.num_copies
    return max(
        float(np.max(np.abs(part - parts[i % size]))) for i, part in enumerate(parts)
    )


def _is_slot(variable):
    return hasattr(variable, "mesh")


def _parts(variable):
    handle = variable.value
    with tf.device(handle.device):
        value = tf.raw_ops.ReadVariableOp(resource=handle.handle, dtype=handle.dtype)
    return dtensor.unpack(value)


class Divides(keras.layers.Layer):
    """Fails on the device whose part of the batch holds a zero."""

    def call(self, inputs):
        return tf.cast(12 // tf.cast(inputs, tf.int32), tf.float32) + self.bias

    def build(self, input_shape):
        self.bias = self.add_weight(name="bias", shape=())


def a_failing_operation_raises(settings):
    strategy = distribution.DTensorStrategy(
        distribution.create_mesh(settings["devices"])
    )
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), Divides()])
        model.compile("sgd", "mse")
    good = np.ones((settings["devices"], 1), "float32")
    before = float(model.evaluate(good, good, verbose=0))
    bad = good.copy()
    bad[-1] = 0.0  # only the last device sees it
    try:
        model.fit(bad, good, batch_size=len(bad), verbose=0)
    except tf.errors.OpError as error:
        return {"raised": type(error).__name__, "before": before}
    return {"raised": None}


def settings_too_late(settings):
    """What is said where DTensor ran before the package could set it up."""
    devices = [f"CPU:{i}" for i in range(2)]
    if settings["fault"] == "asynchronous":
        dtensor_mesh.set_switch()
    mesh = dtensor.create_mesh([("batch", 2)], devices=devices)
    layout = dtensor.Layout.replicated(mesh, 0)
    zero = dtensor.call_with_layout(tf.zeros, layout, shape=())
    tf.function(lambda x: x + 1.0)(zero)
    try:
        distribution.DTensorStrategy(distribution.create_mesh(2))
    except ValueError as error:
        return {"message": str(error)}
    return {"message": None}


def devices_out_of_order(settings):
    """What is said of a mesh on which TensorFlow exchanges rows the wrong way."""
    mesh = distribution.create_mesh(
        devices=["CPU:1", "CPU:0", "CPU:2", "CPU:3"],
        expert_parallel_size=settings["expert_parallel_size"],
    )
    try:
        distribution.DTensorStrategy(mesh)
    except ValueError as error:
        return {"message": str(error)}
    return {"message": None}


def random_numbers_are_those_of_one_device(settings):
    strategy = distribution.DTensorStrategy(
        distribution.create_mesh(settings["devices"])
    )
    x = np.ones((settings["devices"] * 2, 5), "float32")
    values = []
    for scope in (None, strategy):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        if scope is None:
            values.append(np.array(keras.layers.Dropout(0.5, seed=3)(x, training=True)))
            continue
        with strategy.scope():
            layer = keras.layers.Dropout(0.5, seed=3)

        @tf.function
        def step(batch, layer=layer):
            return strategy.run(lambda b: layer(b, training=True) * b, (batch,))

        values.append(step(strategy.lay_out(x)).numpy())
    assert engine.current() is engine.ONE_DEVICE
    return {"apart": float(np.max(np.abs(values[0] - values[1])))}


def _best(x):
    return tf.math.top_k(x, 2)


def _own(x):
    """Where the largest value of each row is, as indices of all."""
    return tf.stack([tf.range(x.shape[0]), tf.argmax(x, -1, tf.int32)], axis=1)


# What own gates are made of, on rows that lie on many devices.
OPERATIONS = {
    "top_k": lambda x: _best(x).values,
    "keras top_k": lambda x: keras.ops.top_k(x, 2)[0],
    "top_k of more axes": lambda x: _best(tf.reshape(x, [-1, 2, 2])).values,
    "top_k of columns": lambda x: _best(tf.transpose(x)).values,
    "top_k of a vector": lambda x: _best(x[:, 0]).values,
    "indices alone": lambda x: x[:, :2] * tf.cast(_best(x).indices, x.dtype),
    "sort": lambda x: tf.sort(x, direction="DESCENDING"),
    "argsort": lambda x: x * tf.cast(tf.argsort(x), x.dtype),
    "rank in the batch": lambda x: x[:, 0] * tf.cast(tf.argsort(x[:, 0]), x.dtype),
    "new axis": lambda x: x[:, tf.newaxis] * 2.0,
    "new axis and ellipsis": lambda x: x[:, tf.newaxis, ...] * 2.0,
    "new first axis": lambda x: x[tf.newaxis] * 2.0,
    "new axes around one": lambda x: x[tf.newaxis, :, 0, tf.newaxis] * 2.0,
    "new axis of a part": lambda x: x[1:3, tf.newaxis, ..., tf.newaxis] * 2.0,
    "last axis": lambda x: x[..., tf.newaxis] * 2.0,
    "gather_nd": lambda x: tf.gather_nd(x, _own(x)),
    "gather": lambda x: tf.gather(x, _own(x)[:, 1:], batch_dims=1),
    "scatter_nd": lambda x: tf.scatter_nd(_own(x), tf.reduce_sum(x, -1), x.shape),
    "scatter update": lambda x: tf.tensor_scatter_nd_update(
        x, _own(x), tf.zeros_like(x[:, 0])
    ),
    "scatter add": lambda x: tf.tensor_scatter_nd_add(x, _own(x), x[:, 1]),
}


def operations_of_gates(settings):
    """Values and gradients, how far they are from those of one device."""
    strategy = distribution.DTensorStrategy(
        distribution.create_mesh(settings["devices"])
    )
    x = np.random.default_rng(0).normal(size=(settings["rows"], 4)).astype("float32")

    def both(function, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            values = function(x)
            total = tf.reduce_sum(tf.square(values))
        return values, tf.convert_to_tensor(tape.gradient(total, x))

    found = {}
    for name, function in OPERATIONS.items():
        if "columns" in name and len(x) % settings["devices"]:
            continue  # raises: a transpose that needs communication
        own = functools.partial(both, function)
        expected = tf.function(own)(tf.constant(x))
        step = tf.function(lambda x, own=own: strategy.run(own, args=(x,)))
        found[name] = [
            float(np.max(np.abs(a - b.numpy())))
            for a, b in zip(expected, step(strategy.lay_out(x)), strict=True)
        ]
    return found


JOBS = (
    operations_of_gates,
    lowered_functions,
    a_failing_operation_raises,
    settings_too_late,
    devices_out_of_order,
    random_numbers_are_those_of_one_device,
)


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    run = {each.__name__: each for each in JOBS}[settings["job"]]
    print("RESULT " + json.dumps(run(settings)), flush=True)


if __name__ == "__main__":
    main()
