"""What each gate runs on: the cells of a table, each of them run.

`python -m tests.conformance.router_table` prints the table for `docs/guides/gating.md`.
A cell is True, or False where a `ValueError` refuses it; anything else is a failure.
"""

import tempfile

import keras
import numpy as np
import tensorflow as tf

from keras_moe import layers, serving
from tests import own_layers
from tests.distribution import children

D, E = 4, 4
# Gates of a user by which tokens have different numbers of experts.
OWN = {
    "yours, of `make_selection_result`": own_layers.AboveGating,
    "yours, of `(assignments,)`": own_layers.AssignmentsGating,
}
ROUTERS = (
    "NoisyTopKGating(k=2)",
    "TopKGating(k=2)",
    "SwitchGating()",
    "SoftmaxGating()",
    "BalancedGating(k=2)",
    "LossFreeGating(k=2)",
    "ExpertChoiceGating()",
    "GShardGating()",
    'GShardGating(second_policy="all", switch_loss_weight=0)',
    *OWN,
)


def name_of(code):
    """As the guide writes it."""
    return code if code in OWN else f"`{code}`"


def gate_of(code):
    if code in OWN:
        return OWN[code]()
    return eval(f"layers.{code}", {"layers": layers})


def mixture(code, **options):
    keras.utils.set_random_seed(0)
    experts = layers.FeedForwardExperts(E, 5)
    return layers.MoE(experts, gate_of(code), name="moe", **options)


def model_of(code, **options):
    return keras.Sequential([keras.Input((3, D)), mixture(code, **options)])


def inputs(rows=8):
    x = np.random.default_rng(0).normal(size=(rows, 3, D))
    return x.astype("float32")


def trained(model, x=None, **options):
    x = inputs() if x is None else x
    model.compile(keras.optimizers.SGD(0.1), "mse", **options)
    history = model.fit(x, np.sin(x), batch_size=4, epochs=2, verbose=0, shuffle=False)
    assert np.isfinite(history.history["loss"]).all()
    return model


def assert_close(a, b, tolerance=1e-4):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def on_one_device(code):
    trained(model_of(code))


def compiled(code):
    model = trained(model_of(code), jit_compile=True)
    assert_close(model.predict(inputs(), verbose=0), model(inputs()))


def with_masks(code):
    x, mask = inputs(), np.arange(3) < np.random.default_rng(1).integers(0, 4, (8, 1))
    layer = mixture(code)
    outputs = layer(x, mask=mask, training=False).numpy()
    np.testing.assert_array_equal(outputs[~mask], 0.0)
    assert_close(outputs[mask], layer(x[mask], training=False))


def with_capacity(code):
    model = trained(model_of(code, capacity_factor=1.0))
    assert_close(model.predict(inputs(), verbose=0), model(inputs()))


def exported(code):
    model = model_of(code)
    with tempfile.TemporaryDirectory() as folder:
        path = serving.export(model, folder)
        serve = tf.saved_model.load(str(path)).signatures["serving_default"]
        (name,) = serve.structured_input_signature[1]
        found = serve(**{name: tf.constant(inputs())})["outputs"]
    assert_close(found, model(inputs()))


def in_half_precision(code):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = trained(model_of(code))
        assert model(inputs()).dtype == tf.bfloat16
    finally:
        keras.config.set_dtype_policy(before)


def in_a_recurrence(code):
    keras.utils.set_random_seed(0)
    layer = layers.MoELSTM(D, E, gate_of(code))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(layer(inputs(), training=True)) + sum(layer.losses)
    for gradient in tape.gradient(total, [v.value for v in layer.trainable_variables]):
        assert gradient is None or np.isfinite(tf.convert_to_tensor(gradient)).all()


def choosing_groups(code):
    keras.utils.set_random_seed(0)
    experts = layers.FeedForwardExperts(2 * E, 5)
    layer = layers.HierarchicalMoE(experts, E, k=(2, 2), primary_gating=gate_of(code))
    trained(keras.Sequential([keras.Input((3, D)), layer]))


def on_engine(engine):
    """Cells of all gates, from one process."""
    settings = {"devices": 2, "routers": list(ROUTERS), "engine": engine}
    return children.run("router_table_child", settings)


HERE = {
    "one device": on_one_device,
    "XLA": compiled,
    "masks": with_masks,
    "`capacity_factor`": with_capacity,
    "export": exported,
    "mixed precision": in_half_precision,
    "`MoELSTM`": in_a_recurrence,
    "groups of `HierarchicalMoE`": choosing_groups,
}
ELSEWHERE = {"`MirroredStrategy`": "mirrored", "mesh": "dtensor"}


def cells(column):
    """Whether each gate does what a column says."""
    if column in ELSEWHERE:
        return on_engine(ELSEWHERE[column])
    return [is_taken(HERE[column], code) for code in ROUTERS]


def is_taken(run, *arguments):
    """True if it runs, False if a `ValueError` of this package refuses it."""
    try:
        run(*arguments)
    except ValueError as error:
        message = str(error)
    else:
        return True
    assert "Received" in message, message
    return False


def table():
    """The lines of the table."""
    columns = [*HERE, *ELSEWHERE]
    found = [cells(column) for column in columns]
    lines = [f"| gate | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for code, *row in zip(ROUTERS, *found, strict=True):
        words = " | ".join("yes" if cell else "no" for cell in row)
        lines.append(f"| {name_of(code)} | {words} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
