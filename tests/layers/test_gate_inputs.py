"""Gates that see something else than the experts, and several gates over them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, serving
from tests.oracles import mixture as oracle

N, D, S, E, H = 7, 4, 3, 5, 6  # tokens, features, those of the gate, experts, hidden


def randomised(layer, rng):
    for weight in layer.trainable_variables:
        weight.assign(rng.normal(size=weight.shape))


def expected_mixture(x, seen, kernel, first, second, k):
    """Equation 1, the gate's product over other features."""
    return oracle.mixture(x, oracle.top_k_gates(seen @ kernel, k), [first, second])


@pytest.fixture
def parts(rng):
    layer = layers.MoE(
        layers.FeedForwardExperts(E, H, dtype="float64"),
        layers.TopKGating(k=2, dtype="float64"),
        dtype="float64",
    )
    x, seen = rng.normal(size=(N, D)), rng.normal(size=(N, S))
    layer(x, gate_inputs=seen)
    randomised(layer, rng)
    return layer, x, seen


def test_values_and_gradients_are_those_of_the_oracle(parts, rng):
    layer, x, seen = parts
    out = rng.normal(size=(N, D))
    variables = [layer.gating.gate_kernel, *layer.experts.kernels]
    tensors = [tf.constant(x), tf.constant(seen)]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = layer(tensors[0], gate_inputs=tensors[1])
        total = tf.reduce_sum(outputs * out)
    arrays = [x, seen, *(v.numpy() for v in variables)]

    def value(*arrays):
        return np.sum(expected_mixture(*arrays, k=2) * out)

    np.testing.assert_allclose(outputs, expected_mixture(*arrays, k=2), rtol=1e-10)
    found = tape.gradient(total, tensors + [v.value for v in variables])
    expected = oracle.numerical_gradients(value, arrays)
    for gradient, numbers in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            tf.convert_to_tensor(gradient), numbers, rtol=1e-5, atol=1e-6
        )


def test_padding_leaves_both(parts, rng):
    layer, x, seen = parts
    mask = np.array([True, True, False, True, True, False, True])
    expected = np.where(mask[:, None], layer(x, gate_inputs=seen), 0.0)
    x[~mask], seen[~mask] = np.nan, np.nan
    for place in (tf.function, lambda call: call):
        call = place(lambda a, b: layer(a, mask=mask, gate_inputs=b))
        np.testing.assert_allclose(call(x, seen), expected, rtol=1e-10)
        with serving.gpu_operations():
            np.testing.assert_allclose(call(x, seen), expected, rtol=1e-10)


def test_a_functional_model_with_gate_inputs_trains_and_reloads(rng, tmp_path):
    words, user = keras.Input((6, D)), keras.Input((6, S))
    moe = layers.HierarchicalMoE(
        layers.FeedForwardExperts(8, H), num_groups=4, k=(2, 1), normalization="all"
    )
    model = keras.Model([words, user], moe(words, gate_inputs=user))
    assert moe.gating.gate_kernel.shape == (4, S, 2)
    assert moe.gating.primary_gating.gate_kernel.shape == (S, 4)
    x = [rng.normal(size=(5, 6, n)).astype("float32") for n in (D, S)]
    model.compile("adam", "mse")
    model.fit(x, x[0], verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    served = exported.serve(x)
    np.testing.assert_allclose(
        served, model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )


def test_gate_inputs_that_do_not_fit_are_named(parts):
    layer, x, seen = parts
    for changed, message in (
        (seen[:-1], r"leading dimensions.*\(6, 3\).*\(7, 4\)"),
        (seen[:, :2], "2 features, gate built for 3"),
        (None, "4 features, gate built for 3.*always or never"),
        (seen.astype("int32"), "(?<!of )`gate_inputs` of MoE must be floating.*int32"),
        (
            tf.RaggedTensor.from_tensor(seen),
            "(?<!of )`gate_inputs` of MoE must.*one dense",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            layer(x, gate_inputs=changed)


def test_several_gates_share_experts(rng):
    """Equal to a mixture for each task, and every expert ran once."""
    x = rng.normal(size=(N, D))
    experts = layers.FeedForwardExperts(E, H, dtype="float64")
    layer = layers.MultiGateMoE(experts, gatings=2, dtype="float64")
    layer.build((None, D))
    randomised(layer, rng)
    calls = []
    network = experts.network
    experts.network = lambda rows, *w: calls.append(rows.shape) or network(rows, *w)
    outputs = layer(x)
    rows = sum(np.prod(shape[:-1]) for shape in calls)
    assert rows == E * N
    for output, gating in zip(outputs, layer.gatings, strict=True):
        kernel = gating.gate_kernel.numpy()
        kernels = [k.numpy() for k in experts.kernels]
        np.testing.assert_allclose(
            output, expected_mixture(x, x, kernel, *kernels, k=E), rtol=1e-9
        )
        alone = layers.MoE(experts, gating, dtype="float64")
        np.testing.assert_allclose(output, alone(x), rtol=1e-9)


def test_tasks_have_logs_and_losses_of_their_own(rng, tmp_path):
    inputs = keras.Input((D,))
    layer = layers.MultiGateMoE(
        layers.FeedForwardExperts(E, H),
        [layers.NoisyTopKGating(k=2), layers.NoisyTopKGating(k=1, normalization="all")],
        importance_loss_weight=0.1,
        load_loss_weight=None,
        name="shared",
    )
    model = keras.Model(inputs, layer(inputs))
    x = rng.normal(size=(32, D)).astype("float32")
    model.compile("adam", ["mse", "mse"])
    logs = model.fit(x, [x, -x], verbose=0).history
    for task in (0, 1):
        assert f"shared_task_{task}_load_cv" in logs
    layer(x, training=True)
    assert len(layer.losses) == 4  # importance and load of two tasks
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.weights) == len(model.weights)
    for a, b in zip(loaded(x), model(x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    with pytest.raises(ValueError, match="`gatings` must have a gate"):
        layers.MultiGateMoE(layers.FeedForwardExperts(E, H), [])
    gatings = [layers.TopKGating(2), 5]
    with pytest.raises(ValueError, match=r"`gatings\[1\]` must be a layer.*=5"):
        layers.MultiGateMoE(layers.FeedForwardExperts(E, H), gatings)
