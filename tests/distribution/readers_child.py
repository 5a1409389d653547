"""Steps of a weight that two replicas share, whose last reader comes late.

Prints one line of JSON: for each replica where its part lay after each step, whether all
of its writes wait for its own readers, and how far weights are from those of one device.
"""

import json
import time

import keras
import numpy as np
import tensorflow as tf

from keras_moe import engine, optimizers
from tests.distribution import child

SHAPE, ROWS = (8, 512, 256), 4  # so large that it is updated in blocks
WRITES = ("AssignSubVariableOp", "AssignVariableOp", "ResourceScatterNdSub")


def late(x):
    time.sleep(0.2)
    return x


@tf.custom_gradient
def product(x, w):
    """`x @ w`, whose gradient in x reads w long after that in w is there."""

    def gradient(upstream):
        waited = tf.numpy_function(late, [upstream], upstream.dtype, stateful=False)
        waited = tf.ensure_shape(waited, upstream.shape)
        return tf.matmul(waited, w, transpose_b=True), tf.matmul(
            x, upstream, transpose_a=True
        )

    return tf.matmul(x, w), gradient


class Product(keras.layers.Layer):
    """Every expert on rows of its own."""

    def build(self, shape):
        self.scale = self.add_weight(shape=SHAPE[1:2], initializer="ones", name="scale")
        weights = engine.for_weights().weights
        self.kernel = weights.add_expert_weight(
            self, SHAPE, keras.initializers.RandomNormal(seed=1), "kernel"
        )
        self.kernel.is_expert_weight = True

    def call(self, x):
        return product(x * self.scale.value, self.kernel.value)


def trained(strategy, x, **options):
    """Kernel, places of its parts after each step, and which wait for their readers."""
    with child.scope_of(strategy):
        layer = Product()
        layer.build(x.shape)
        optimizer = optimizers.FactoredAdam(0.1, **options)
        optimizer.build(layer.trainable_variables)
    parts = getattr(layer.kernel, "parts", [layer.kernel.value])

    def of_replica():
        here = engine.current().replicas.index, len(parts)
        size = SHAPE[0] // here[1]
        own = x[here[0] * size : (here[0] + 1) * size]
        weights = layer.trainable_variables
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(layer(own)))
        optimizer.apply(tape.gradient(loss, [v.value for v in weights]), weights)

    @tf.function
    def step():
        if strategy is None:
            of_replica()
        else:
            strategy.run(of_replica)

    places = []
    for _ in range(4):
        step()
        places.append([p.read_value()._numpy().ctypes.data for p in parts])
    graph = step.get_concrete_function().graph
    waits = [waits_for_own(graph, part) for part in parts] if strategy else None
    return layer.kernel.numpy(), list(zip(*places, strict=True)), waits


def waits_for_own(graph, part):
    """Whether all writes of a part come after all products with it."""
    handle = graph.capture(part.handle)
    writes = [op for op in handle.consumers() if op.type in WRITES]
    reads = [op for op in handle.consumers() if op.type == "ReadVariableOp"]
    values = [op.outputs[0] for op in reads]
    products = set()
    while values:
        for op in values.pop().consumers():
            if "MatMul" in op.type:
                products.add(op.name)
            elif op.type == "Identity":
                values += op.outputs
    assert writes, "nothing writes the weight"
    assert len(products) == 2, products
    return all(products <= before(write) for write in writes)


def before(operation):
    found, waiting = set(), [operation]
    while waiting:
        each = waiting.pop()
        if each.name not in found:
            found.add(each.name)
            waiting += [tensor.op for tensor in each.inputs] + each.control_inputs
    return found


def main():
    child.start(2)
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(SHAPE[0], ROWS, SHAPE[1])), "float32")
    found = {}
    for name, options in (("blocks", {}), ("whole", {"factored": [], "epsilon": 1e-5})):
        expected = trained(None, x, **options)[0]
        kernel, places, waits = trained(child.strategy_of(2), x, **options)
        apart = float(np.max(np.abs(kernel - expected)))
        found[name] = {"places": places, "waits": waits, "apart": apart}
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
