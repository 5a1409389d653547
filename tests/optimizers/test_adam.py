"""Weights that are not factored: Adam in one pass."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe.optimizers import FactoredAdam, adam

# The rate is a float32 in Keras.
RATE, BETA_1, BETA_2, EPSILON = 2.0**-7, 0.8, 0.95, 1e-3


def oracle(weight, gradients, factor=1.0):
    """Kingma and Ba 2015, in the order of computation at the end of their section 2."""
    weight = weight.astype("float64")
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        gradient = gradient.astype("float64")
        m = BETA_1 * m + (1 - BETA_1) * gradient
        v = BETA_2 * v + (1 - BETA_2) * gradient**2
        rate = factor * RATE * np.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)
        weight = weight - rate * m / (np.sqrt(v) + EPSILON)
    return weight, m, v


def make(shape, dtype, rng, **options):
    start = rng.normal(size=shape)
    variable = keras.Variable(start, dtype=dtype, name="weight")
    optimizer = FactoredAdam(RATE, BETA_1, BETA_2, EPSILON, factored=[], **options)
    optimizer.build([variable])
    return optimizer, variable, variable.numpy().astype("float64")


def stepper(optimizer, variable, mode):
    def step(gradient):
        optimizer.apply_gradients([(gradient, variable)])

    if mode == "eager":
        return step
    return tf.function(step, jit_compile=mode == "xla")


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-6), ("bfloat16", 0.05)]
)
def test_equals_the_oracle(mode, dtype, tolerance, rng):
    if mode == "xla":  # Keras, which rounds the decays to float32
        tolerance = max(tolerance, 1e-7)
    optimizer, variable, start = make((4, 3), dtype, rng)
    step = stepper(optimizer, variable, mode)
    gradients = [tf.cast(rng.normal(size=(4, 3)), dtype) for _ in range(5)]
    for gradient in gradients:
        step(gradient)
    expected = oracle(start, [tf.cast(g, "float64").numpy() for g in gradients])
    for found, wanted in zip(
        (variable, *optimizer.slots_of(variable)), expected, strict=True
    ):
        found = np.asarray(tf.cast(tf.convert_to_tensor(found), "float64"))
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_look_ups_and_factors_of_the_rate_equal_the_oracle(rng):
    optimizer, variable, start = make(
        (5, 3), "float64", rng, learning_rate_factors={"weight": 0.5}
    )
    values = rng.normal(size=(3, 3))
    dense = np.zeros((5, 3))
    np.add.at(dense, [4, 1, 4], values)
    for _ in range(2):
        gradient = tf.IndexedSlices(tf.constant(values), tf.constant([4, 1, 4]), (5, 3))
        optimizer.apply_gradients([(gradient, variable)])
    expected = oracle(start, [dense, dense], factor=0.5)[0]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-12)


def test_one_operation_updates_a_weight_in_a_graph(rng):
    optimizer, variable, _ = make((4, 3), "float32", rng)
    step = stepper(optimizer, variable, "graph")
    graph = step.get_concrete_function(tf.TensorSpec((4, 3))).graph
    kinds = [op.type for op in graph.get_operations()]
    assert kinds.count("ResourceApplyAdam") == 1
    # Nothing else has the size of the weight.
    sized = [
        op.type
        for op in graph.get_operations()
        for output in op.outputs
        if output.shape == (4, 3)
    ]
    assert set(sized) <= {"Placeholder", "Identity", "IdentityN"}


def test_a_strategy_is_left_to_keras(rng):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        optimizer, variable, start = make((4, 3), "float32", rng)
    gradient = rng.normal(size=(4, 3)).astype("float32")

    @tf.function
    def step():
        def of_replica():
            assert not adam.can_be_applied(variable, tf.constant(gradient))
            optimizer.apply_gradients([(tf.constant(gradient), variable)])

        strategy.run(of_replica)

    step()
    expected = oracle(start, [gradient])[0]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-5)
