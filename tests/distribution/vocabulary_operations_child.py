"""What layers make of shared words, for rows of which a replica may have none.

`python -m tests.distribution.vocabulary_operations_child SETTINGS`: SETTINGS is JSON with
`engine`, `devices` and `rows`, those of each replica. Prints one line of JSON: for each
operation its value and the gradients of the arrays it is made of, all in float64, and
what is said of ids that are no words.
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_moe
from keras_moe.distribution.dtensor.variables import whole
from keras_moe.layers.embedding import Embedding
from keras_moe.layers.word_scores import Dense as WordScores
from tests.distribution import child
from tests.distribution.vocabulary_child import strategy_of

WORDS, FEATURES, CANDIDATES = 7, 3, (1, 6, 3)
COUNTS = (0.9, 0.2, 0.4)


def arrays(num_rows):
    """Ids, targets, inputs, and table, kernel and bias, always the same."""
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, WORDS, (2, num_rows))
    inputs = rng.normal(size=(num_rows, FEATURES))
    table, kernel = rng.normal(size=(2, WORDS, FEATURES))
    return ids, targets, inputs, table, kernel, rng.normal(size=WORDS)


def weights_of(shape):
    """How the elements of a result are weighted before they are summed."""
    return np.random.default_rng(1).normal(size=shape)


class Sampled(keras_moe.layers.SampledSoftmax):
    """With given candidates."""

    def sample(self):
        return tf.constant(CANDIDATES, tf.int64), tf.constant(COUNTS, tf.float64)


def make_layers(num_rows):
    *_, table, kernel, bias = arrays(num_rows)
    found = {
        "rows": Embedding(WORDS, FEATURES),
        "scores": WordScores(WORDS),
        "losses": WordScores(WORDS),
        "sampled": Sampled(WORDS, num_sampled=len(CANDIDATES)),
        "exact": Sampled(WORDS, num_sampled=len(CANDIDATES)),
    }
    for name, layer in found.items():
        layer.build((None, FEATURES))
        values = {"rows": [table], "scores": [kernel.T, bias]}
        values |= {"losses": values["scores"]}
        layer.set_weights(values.get(name, [kernel, bias]))
    return found


def call(name, layer, ids, targets, inputs):
    if name == "rows":
        return layer(ids)
    if name == "scores":
        return layer(inputs)
    if name == "losses":
        return layer.losses_of(inputs, targets)
    return layer(inputs, targets=targets, training=name == "sampled")


class Replicas:
    """Runs steps on the replicas of a mirrored strategy, with their rows."""

    def __init__(self, strategy, rows):
        self.strategy = strategy
        self.starts = np.cumsum([0, *rows])

    def given(self, array):
        def part(context):
            index = context.replica_id_in_sync_group
            return tf.constant(array[self.starts[index] : self.starts[index + 1]])

        return self.strategy.experimental_distribute_values_from_function(part)

    def joined(self, value, axis):
        parts = self.strategy.experimental_local_results(value)
        return np.concatenate([part.numpy() for part in parts], axis)


class Mesh:
    """Runs steps on a mesh, which sees all rows."""

    def __init__(self, strategy):
        self.strategy = strategy

    def given(self, array):
        return self.strategy.lay_out(tf.constant(array))

    def joined(self, value, axis):
        found = whole(value).numpy()
        missing = -WORDS % self.strategy.mesh.size
        if (
            missing and found.shape[axis] == WORDS + missing
        ):  # no number of rows is that
            # Words of the padding have no gradient.
            found, padding = np.split(found, [WORDS], axis)
            assert not padding.any()
        return found


def main():
    settings = json.loads(sys.argv[1])
    rows = settings["rows"]
    child.start(settings["devices"])
    keras.config.set_floatx("float64")
    strategy = strategy_of(settings)
    with strategy.scope():
        layers = make_layers(sum(rows))
    on_mesh = settings["engine"] == "dtensor"
    there = Mesh(strategy) if on_mesh else Replicas(strategy, rows)
    *given, _, _, _ = arrays(sum(rows))
    found = {}
    for name, layer in layers.items():

        def step(ids, targets, inputs, weights, name=name, layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                answer = call(name, layer, ids, targets, inputs)
                total = tf.reduce_sum(answer * weights)
            sources = [*layer.trainable_variables, inputs]
            gradients = tape.gradient(total, sources, unconnected_gradients="zero")
            return answer, [tf.convert_to_tensor(g) for g in gradients]

        shape = {"rows": FEATURES, "scores": WORDS}.get(name)
        weights = weights_of((sum(rows), shape) if shape else (sum(rows),))
        args = tuple(there.given(array) for array in (*given, weights))
        answer, gradients = tf.function(strategy.run, autograph=False)(step, args=args)
        *of_tables, of_inputs = gradients
        axes = [variable.axis for variable in layer.trainable_variables]
        found[name] = {
            "value": there.joined(answer, 0).tolist(),
            "gradients": [
                *(
                    there.joined(g, i).tolist()
                    for g, i in zip(of_tables, axes, strict=True)
                ),
                there.joined(of_inputs, 0).tolist(),
            ],
        }
        print(name, flush=True)
    if on_mesh:
        found["drawn"] = drawn(there)
    else:
        found["no word"] = [said_of(strategy, layers["rows"], i) for i in (-1, WORDS)]
    print("RESULT " + json.dumps(found), flush=True)


def drawn(mesh):
    """Candidates and their expected counts, of two steps."""
    with mesh.strategy.scope():
        layer = keras_moe.layers.SampledSoftmax(50, num_sampled=8, seed=3)
        layer.build((None, FEATURES))
    step = tf.function(mesh.strategy.run, autograph=False)
    rows = mesh.given(np.zeros((mesh.strategy.mesh.size, 1)))
    found = []
    for _ in range(2):
        ids, counts, _ = step(lambda rows: (*layer.sample(), rows), args=(rows,))
        found.append([whole(ids).numpy().tolist(), whole(counts).numpy().tolist()])
    return found


def said_of(strategy, layer, number):
    """The error of an id that is no word."""
    ids = tf.constant([0, number])
    try:
        tf.function(lambda: strategy.run(layer, args=(ids,)))()
    except tf.errors.InvalidArgumentError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
