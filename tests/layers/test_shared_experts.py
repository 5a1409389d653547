"""Experts that every token passes, beside those that the gate chooses."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import distribution, layers, serving
from tests.oracles import experts as oracle
from tests.oracles import mixture as paper

N, D, E, K, H = 10, 4, 5, 2, 3


def shared_network(**kwargs):
    return keras.Sequential(
        [keras.layers.Dense(6, "tanh", **kwargs), keras.layers.Dense(D, **kwargs)]
    )


def make(rng, shared, cls=layers.MoE, dtype="float64", **options):
    experts = layers.GatedExperts(E, H, dtype=dtype)
    if cls is layers.HierarchicalMoE:
        experts = layers.GatedExperts(6, H, dtype=dtype)
        options = {"num_groups": 3, "k": (2, 2), **options}
    else:
        options["gating"] = layers.TopKGating(K, dtype=dtype)
    layer = cls(experts, shared_experts=shared, dtype=dtype, **options)
    layer.build((None, D))
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


def without_shared(layer):
    """The same mixture by itself."""
    copy = type(layer).from_config({**layer.get_config(), "shared_experts": None})
    copy.build((None, D))
    for part in ("gating", "experts"):
        getattr(copy, part).set_weights(getattr(layer, part).get_weights())
    return copy


def test_the_sum_equals_the_oracle_in_value_and_every_gradient(rng):
    layer, x = make(rng, shared_network(dtype="float64")), rng.normal(size=(N, D))
    dense = layer.shared_experts.layers
    variables = [layer.gating.gate_kernel, *layer.experts.kernels]
    variables += [w for each in dense for w in (each.kernel, each.bias)]
    weights = rng.normal(size=(N, D))

    def expected(x, gate_kernel, a, b, c, k0, b0, k1, b1):
        gates = paper.top_k_gates(x @ gate_kernel, K)
        chosen = oracle.mixture(
            x, gates, lambda e, token: oracle.gated(token, (a[e], b[e], c[e]))
        )
        return chosen + np.tanh(x @ k0 + b0) @ k1 + b1

    inputs = tf.constant(x)
    sources = [inputs, *(v.value for v in variables)]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs)
        total = tf.reduce_sum(outputs * weights)
    arrays = [x, *(v.numpy() for v in variables)]
    np.testing.assert_allclose(outputs, expected(*arrays), rtol=1e-9)
    wanted = paper.numerical_gradients(
        lambda *a: float(np.sum(weights * expected(*a))), arrays
    )
    for found, numbers in zip(tape.gradient(total, sources), wanted, strict=True):
        np.testing.assert_allclose(found, numbers, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", [layers.MoE, layers.HierarchicalMoE])
@pytest.mark.parametrize("options", [{}, {"activation": "sigmoid"}], ids=str)
def test_the_answer_is_added_before_the_activation(rng, cls, options):
    layer = make(rng, shared_network(dtype="float64"), cls, **options)
    plain, x = without_shared(layer), rng.normal(size=(2, 3, D))
    plain.activation = keras.activations.linear
    total = plain(x) + layer.shared_experts(x.reshape(6, D)).numpy().reshape(x.shape)
    np.testing.assert_allclose(layer(x), layer.activation(total), rtol=1e-10)


@pytest.mark.parametrize("where", ["dropless", "capacity", "gpu"])
def test_padding_gets_nothing_and_gives_nothing(rng, where):
    capacity = {"evaluation_capacity_factor": 5.0} if where == "capacity" else {}
    layer = make(rng, shared_network(dtype="float64"), **capacity)
    x, mask = rng.normal(size=(N, D)), np.arange(N) % 3 > 0
    expected = np.where(mask[:, np.newaxis], layer(x), 0.0)
    run = tf.function(lambda x, mask: layer(x, mask=mask), autograph=False)
    x[~mask] = np.nan
    if where == "gpu":
        with serving.gpu_operations():
            found = run(x, mask)
    else:
        found = run(x, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_normalization_among_shared_experts_does_not_see_padding(rng):
    shared = keras.Sequential(
        [keras.layers.BatchNormalization(momentum=0.0), keras.layers.Dense(D)]
    )
    layer = make(rng, shared, dtype="float32")
    x, mask = rng.normal(size=(N, D)).astype("float32"), np.arange(N) < 4
    layer(x, mask=mask, training=True)
    mean = shared.layers[0].moving_mean
    np.testing.assert_allclose(mean, x[:4].mean(axis=0), atol=1e-6)


def test_training_is_passed_on_and_gates_are_unaffected(rng):
    layer = make(rng, keras.Sequential([keras.layers.Dropout(0.5)]), dtype="float32")
    plain = without_shared(layer)
    x = np.ones((50, D), "float32")
    added = (layer(x, training=True) - plain(x, training=True)).numpy()
    assert {0.0, 2.0} == set(np.round(np.unique(added), 4).tolist())
    np.testing.assert_allclose(layer(x) - plain(x), x, atol=1e-5)
    np.testing.assert_array_equal(layer.route(x).gates, plain.route(x).gates)
    np.testing.assert_allclose(layer.losses, plain.losses)


def test_configs_and_files_of_before_load(rng):
    layer = make(rng, None)
    config = layer.get_config()
    assert config.pop("shared_experts") is None
    assert layers.MoE.from_config(config).shared_experts is None
    assert len(layer.get_weights()) == 4  # no weight more than before


def test_they_train_are_saved_and_are_counted(rng, tmp_path):
    layer = make(rng, shared_network(), dtype="float32")
    model = keras.Sequential([keras.Input((D,)), layer])
    model.compile("sgd", "mse")
    x, before = rng.normal(size=(N, D)), layer.shared_experts.get_weights()
    model.fit(x, x, verbose=0)
    after = layer.shared_experts.get_weights()
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, after, strict=True))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    # 4 * 6 + 6 and 6 * 4 + 4 numbers of the shared experts, in float32.
    less = distribution.describe(
        keras.Sequential([keras.Input((D,)), without_shared(layer)])
    )
    whole = distribution.describe(keras.Sequential([keras.Input((D,)), layer]))
    assert whole.replicated_bytes - less.replicated_bytes == 4 * 58


def test_a_batch_of_nothing_reaches_layers_that_cannot_take_it(rng):
    shared = keras.Sequential([keras.layers.Reshape((D, 1)), keras.layers.Flatten()])
    layer = make(rng, shared)
    assert layer(np.zeros((0, D)), training=True).shape == (0, D)


def test_bad_shared_experts_are_refused(rng):
    with pytest.raises(ValueError, match="shared_experts=3"):
        make(rng, 3)
    with pytest.raises(ValueError, match=r"outputs \(None, 7\).*output_units=4"):
        make(rng, keras.layers.Dense(7))
    with pytest.raises(ValueError, match="`shared_experts` must take rows"):
        make(rng, keras.layers.Conv2D(3, 3))
