import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers
from tests.oracles import mixture as oracle

N, D, H, E, K = 12, 5, 4, 6, 2


def make(k=K, num_experts=E, dtype="float64", **options):
    experts = layers.FeedForwardExperts(num_experts, H, dtype=dtype)
    return layers.MoE(
        experts,
        layers.NoisyTopKGating(k=k, seed=3, dtype=dtype),
        dtype=dtype,
        **options,
    )


def randomised(layer, rng, features=D):
    layer.build((None, features))
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer


@pytest.fixture
def layer(rng):
    return randomised(make(), rng)


@pytest.fixture
def x(rng):
    return rng.normal(size=(N, D))


def weights_of(layer):
    gating = layer.gating
    return [
        v.value
        for v in (gating.gate_kernel, gating.noise_kernel, *layer.experts.kernels)
    ]


def test_training_equals_the_oracle_in_value_losses_and_every_gradient(layer, x, rng):
    # The noise that the layer will draw, from a generator of the same seed.
    noise = keras.random.normal(
        (N, E), dtype="float64", seed=keras.random.SeedGenerator(3)
    ).numpy()
    weights = rng.normal(size=(N, D))

    def expected(x, gate_kernel, noise_kernel, *kernels):
        y, importance, load = oracle.noisy_top_k_mixture(
            x, gate_kernel, noise_kernel, noise, kernels, K
        )
        losses = [0.1 * oracle.cv_squared(importance), 0.1 * oracle.cv_squared(load)]
        return y, losses

    variables = weights_of(layer)
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, training=True)
        losses = layer.losses
        total = tf.reduce_sum(outputs * weights) + tf.add_n(losses)
    arrays = [x, *(v.numpy() for v in variables)]
    y, expected_losses = expected(*arrays)
    np.testing.assert_allclose(outputs, y, rtol=1e-8)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)

    def scalar(*arrays):
        y, losses = expected(*arrays)
        return float(np.sum(weights * y) + sum(losses))

    for gradient, wanted in zip(
        tape.gradient(total, [inputs, *variables]),
        oracle.numerical_gradients(scalar, arrays),
        strict=True,
    ):
        np.testing.assert_allclose(
            tf.convert_to_tensor(gradient), wanted, rtol=1e-4, atol=1e-6
        )


def test_inference_has_no_noise_and_reports_true_counts_in_its_losses(layer, x):
    layer.losses_in_evaluation = True
    gate_kernel, _, *kernels = (v.numpy() for v in weights_of(layer))
    gates = oracle.top_k_gates(x @ gate_kernel, K)
    np.testing.assert_allclose(layer(x), oracle.mixture(x, gates, kernels), rtol=1e-9)
    expected = [
        0.1 * oracle.cv_squared(gates.sum(axis=0)),
        0.1 * oracle.cv_squared((gates > 0).sum(axis=0)),
    ]
    np.testing.assert_allclose(layer.losses, expected, rtol=1e-9)
    np.testing.assert_array_equal(layer(x), layer(x))


def test_noise_differs_between_calls_and_repeats_with_the_seed(rng, x):
    first, second = make(), make()
    for layer in (first, second):
        randomised(layer, np.random.default_rng(0))
    runs = [
        [layer(x, training=True).numpy() for _ in range(2)] for layer in (first, second)
    ]
    assert np.abs(runs[0][0] - runs[0][1]).max() > 1e-3
    np.testing.assert_array_equal(runs[0], runs[1])


@pytest.mark.parametrize("shape", [(7, D), (2, 3, D), (2, 3, 2, D)])
def test_all_leading_dimensions_are_one_batch(layer, rng, shape):
    x = rng.normal(size=shape)
    flat = layer(x.reshape(-1, D)).numpy()
    np.testing.assert_array_equal(layer(x), flat.reshape(shape))


def test_a_token_does_not_depend_on_its_batch_mates(layer, x):
    whole = layer(x).numpy()
    for n in range(N):
        np.testing.assert_allclose(layer(x[n : n + 1]), whole[n : n + 1], atol=1e-12)


def test_permuting_tokens_permutes_outputs(layer, x, rng):
    order = rng.permutation(N)
    np.testing.assert_allclose(layer(x[order]), layer(x).numpy()[order], atol=1e-12)


def test_permuting_experts_changes_nothing(layer, x, rng):
    before = layer(x).numpy()
    order = rng.permutation(E)
    for kernel in (layer.gating.gate_kernel, layer.gating.noise_kernel):
        kernel.assign(kernel.numpy()[:, order])
    for kernel in layer.experts.kernels:
        kernel.assign(kernel.numpy()[order])
    np.testing.assert_allclose(layer(x), before, atol=1e-12)


def test_k_equal_to_num_experts_is_softmax_gating(rng, x):
    with pytest.warns(UserWarning, match=r"k=6 of num_experts=6.*load_loss_weight=0.1"):
        layer = randomised(make(k=E), rng)
    soft = layers.MoE(
        layers.FeedForwardExperts(E, H, dtype="float64"),
        layers.SoftmaxGating(dtype="float64"),
        dtype="float64",
    )
    soft.build((None, D))
    soft.gating.gate_kernel.assign(layer.gating.gate_kernel)
    soft.experts.set_weights(layer.experts.get_weights())
    np.testing.assert_allclose(layer(x), soft(x), atol=1e-12)


def test_one_expert_is_that_expert(rng, x):
    layer = randomised(make(k=1, num_experts=1), rng)
    first, second = (kernel.numpy()[0] for kernel in layer.experts.kernels)
    np.testing.assert_allclose(layer(x), np.maximum(x @ first, 0) @ second, atol=1e-12)


def test_activation_is_applied_to_the_combined_output(rng, x):
    plain, squashed = make(), make(activation="sigmoid")
    for layer in (plain, squashed):
        randomised(layer, np.random.default_rng(0))
    np.testing.assert_allclose(squashed(x), tf.sigmoid(plain(x)), atol=1e-12)


MASK = np.array([[1, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 1]], bool)


@pytest.mark.parametrize("capacity_factor", [None, float(E)])
def test_padding_is_neither_routed_nor_counted(rng, capacity_factor):
    options = {"capacity_factor": capacity_factor, "losses_in_evaluation": True}
    layer = randomised(make(**options), rng)
    x = rng.normal(size=(2, 6, D))
    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, mask=MASK)
        losses = [float(loss) for loss in layer.losses]
        total = tf.reduce_sum(tf.sin(outputs)) + tf.add_n(layer.losses)
    gradient = tape.gradient(total, inputs).numpy()
    np.testing.assert_array_equal(outputs.numpy()[~MASK], 0.0)
    np.testing.assert_array_equal(gradient[~MASK], 0.0)
    np.testing.assert_allclose(outputs.numpy()[MASK], layer(x[MASK]), atol=1e-12)
    np.testing.assert_allclose(losses, layer.losses, rtol=1e-12)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_a_batch_of_nothing_but_padding(rng, capacity_factor):
    layer = randomised(make(capacity_factor=capacity_factor), rng)
    outputs = layer(
        rng.normal(size=(2, 3, D)), mask=np.zeros((2, 3), bool), training=True
    )
    np.testing.assert_array_equal(outputs, np.zeros((2, 3, D)))
    np.testing.assert_array_equal(layer.losses, [0.0, 0.0])


def test_keras_passes_the_mask_of_an_embedding():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    embedding = keras.layers.Embedding(5, D, mask_zero=True, dtype="float64")
    layer = make(dtype="float64")
    keras.Sequential([embedding, layer])(tokens)
    layer.gating.gate_kernel.assign(np.random.default_rng(0).normal(size=(D, E)))
    outputs = layer(embedding(tokens)).numpy()
    assert (np.abs(outputs).sum(axis=-1) > 0).tolist() == (tokens > 0).tolist()


def test_dropless_equals_a_capacity_that_nothing_exceeds(rng, x):
    dropless, roomy = make(), make(capacity_factor=float(E))
    for layer in (dropless, roomy):
        randomised(layer, np.random.default_rng(0))
    np.testing.assert_allclose(roomy(x), dropless(x), atol=1e-12)


# Logs.


def counts_by_hand(layer, x):
    experts = layer.route(x).expert_indices.numpy()
    return np.bincount(experts.reshape(-1), minlength=layer.num_experts)


def in_a_model(layer, width=D):
    return keras.Sequential([keras.Input((3, width)), layer])


@pytest.mark.parametrize(
    "options", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str
)
def test_balance_in_the_logs_is_that_of_all_batches(rng, options):
    layer = make(dtype="float32")
    model = in_a_model(layer)
    layer.gating.gate_kernel.assign(rng.normal(size=(D, E)))
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    x = rng.normal(size=(16, 3, D)).astype("float32")
    history = model.fit(x, x, batch_size=4, verbose=0, validation_data=(x, x)).history
    counts = counts_by_hand(layer, x)
    assert history["val_moe_max_over_mean_load"][0] == pytest.approx(
        counts.max() / counts.mean(), rel=1e-5
    )
    assert history["val_moe_load_cv"][0] == pytest.approx(
        counts.std() / counts.mean(), rel=1e-5
    )
    gates = oracle.top_k_gates(
        x.reshape(-1, D).astype("float64") @ layer.gating.gate_kernel.numpy(), K
    )
    importance = gates.sum(axis=0)
    assert history["val_moe_importance_cv"][0] == pytest.approx(
        importance.std() / importance.mean(), rel=1e-4
    )
    # 16 * 3 tokens, two experts each, counted once in training too.
    model.predict(x, verbose=0)
    model.fit(x, x, batch_size=4, verbose=0)
    assert int(sum(layer.balance.counts())) == 16 * 3 * K


def test_prediction_between_evaluations_disturbs_nothing(rng):
    layer = make(dtype="float32")
    model = in_a_model(layer)
    model.compile("sgd", "mse", run_eagerly=True)
    x = rng.normal(size=(8, 3, D)).astype("float32")
    first = model.evaluate(x, x, verbose=0, return_dict=True)
    model.predict(x, verbose=0)
    model(x)
    assert model.evaluate(x, x, verbose=0, return_dict=True) == first


def test_a_layer_called_twice_counts_both_calls(rng):
    layer = make(dtype="float32")
    inputs = keras.Input((3, D))
    model = keras.Model(inputs, layer(layer(inputs)))
    model.compile("sgd", "mse")
    x = rng.normal(size=(4, 3, D)).astype("float32")
    model.evaluate(x, x, verbose=0)
    assert int(sum(layer.balance.counts())) == 2 * 4 * 3 * K
    model(x, training=True)
    assert len(model.losses) == 4


def test_two_layers_have_their_own_names_in_the_logs(rng):
    model = keras.Sequential(
        [keras.Input((3, D)), make(dtype="float32"), make(dtype="float32")]
    )
    model.compile("sgd", "mse")
    x = rng.normal(size=(4, 3, D)).astype("float32")
    logs = model.evaluate(x, x, verbose=0, return_dict=True)
    assert {"moe_load_cv", "moe_1_load_cv"} <= logs.keys()


def test_overflow_is_counted_and_reported(rng):
    layer = make(
        k=1,
        num_experts=2,
        capacity_factor=0.5,
        evaluation_capacity_factor=0.5,
        dtype="float32",
    )
    model = in_a_model(layer)
    # All logits are positive for expert 1, so it gets all 4 * 3 tokens of a
    # batch and has ceil(0.5 * 1 * 12 / 2) = 3 slots: 9 of 12 are dropped.
    layer.gating.gate_kernel.assign(np.array([[-1.0, 1.0]] * D))
    model.compile("sgd", "mse")
    x = rng.uniform(0.1, 1.0, size=(8, 3, D)).astype("float32")
    logs = model.evaluate(x, x, batch_size=4, verbose=0, return_dict=True)
    assert logs["moe_overflow"] == pytest.approx(9 / 12)


# Models.


def sequential():
    return keras.Sequential(
        [keras.Input((None, D)), make(dtype="float32"), keras.layers.Dense(1)]
    )


def functional():
    inputs = keras.Input((None, D))
    return keras.Model(inputs, keras.layers.Dense(1)(make(dtype="float32")(inputs)))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moe = make(dtype="float32")
        self.dense = keras.layers.Dense(1)

    def call(self, inputs, training=None):
        return self.dense(self.moe(inputs, training=training))


@pytest.mark.parametrize("make_model", [sequential, functional, Subclassed])
def test_models_of_every_kind_train_evaluate_predict_and_save(
    rng, make_model, tmp_path
):
    model = make_model()
    model.compile(keras.optimizers.Adam(0.01), "mse", weighted_metrics=["mae"])
    x = rng.normal(size=(32, 4, D)).astype("float32")
    y = x.sum(axis=-1, keepdims=True)
    weight = rng.uniform(size=(32, 4)).astype("float32")
    history = model.fit(
        x,
        y,
        sample_weight=weight,
        validation_data=(x, y, weight),
        epochs=6,
        verbose=0,
        callbacks=[
            keras.callbacks.EarlyStopping(patience=3),
            keras.callbacks.TerminateOnNaN(),
        ],
    ).history
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert np.isfinite(model.evaluate(x, y, sample_weight=weight, verbose=0)).all()
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    )


@pytest.mark.parametrize("capacity_factor", [None, 2.0])
def test_keras_compiles_with_xla(rng, capacity_factor):
    model = keras.Sequential(
        [keras.Input((3, D)), make(capacity_factor=capacity_factor, dtype="float32")]
    )
    model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile is True
    x = rng.normal(size=(8, 3, D)).astype("float32")
    assert np.isfinite(model.fit(x, x, verbose=0).history["loss"][0])


def test_under_mixed_precision_the_gate_is_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = layers.MoE(layers.FeedForwardExperts(E, H), layers.NoisyTopKGating(k=K))
    layer(np.ones((2, D), "float32"))
    assert layer.gating.compute_dtype == "float32"
    assert layer.experts.compute_dtype == "bfloat16"
    result = layer.route(np.ones((2, D), "float32"), training=True)
    assert result.gates.dtype == tf.float32
    assert result.statistics.load.dtype == tf.float32


# Bad input.


def test_default_gate_and_default_name():
    layer = layers.MoE(layers.FeedForwardExperts(8, 4))
    assert isinstance(layer.gating, layers.NoisyTopKGating)
    assert (layer.gating.k, layer.gating.num_experts, layer.name) == (4, 8, "moe")


def test_k_of_one_warns_that_the_gate_cannot_learn_from_the_task():
    with pytest.warns(UserWarning, match="k=1 of num_experts=6"):
        make(k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers.MoE(
            layers.FeedForwardExperts(E, H),
            layers.NoisyTopKGating(k=1, normalization="all"),
        )


@pytest.mark.parametrize(
    ("normalization", "learns"), [("selected", False), ("all", True)]
)
@pytest.mark.filterwarnings("ignore:.*k=1")
def test_k_of_one_learns_from_the_task_with_probability_gates(
    rng, x, normalization, learns
):
    layer = layers.MoE(
        layers.FeedForwardExperts(E, H, dtype="float64"),
        layers.NoisyTopKGating(k=1, normalization=normalization, dtype="float64"),
        dtype="float64",
    )
    randomised(layer, rng)
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(tf.sin(layer(x)))
    gradient = tape.gradient(total, layer.gating.gate_kernel.value).numpy()
    assert (np.abs(gradient).max() > 1e-6) == learns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 7}, "k=7, num_experts=6"),
        ({"k": 2.0}, "k=2.0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"importance_loss_weight": -0.1}, "importance_loss_weight=-0.1"),
        ({"load_loss_weight": float("nan")}, "load_loss_weight=nan"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_parts_are_refused():
    experts = layers.FeedForwardExperts(4, 4)
    with pytest.raises(ValueError, match="`experts` must be a layer"):
        layers.MoE("experts")
    with pytest.raises(
        ValueError, match="`experts` must be a layer with a `num_experts`"
    ):
        layers.MoE(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="`gating` must be a layer"):
        layers.MoE(experts, "softmax")
    with pytest.raises(ValueError, match="num_experts=5, experts.num_experts=4"):
        layers.MoE(experts, layers.NoisyTopKGating(k=2, num_experts=5))


def test_bad_inputs_are_refused(x):
    with pytest.raises(ValueError, match=r"rank=1"):
        make()(np.ones(3))
    with pytest.raises(ValueError, match=r"shape=\(None, None\)"):
        make()(keras.Input((None,)))
    with pytest.raises(ValueError, match="dtype=int64"):
        make()(np.ones((2, 3), "int64"))
    layer = make()
    layer(x)
    with pytest.raises(ValueError, match="expected axis -1"):
        layer(np.ones((2, D + 1)))
    with pytest.raises(
        ValueError, match=r"mask.shape=\(3,\), inputs.shape=\(2, 4, 5\)"
    ):
        layer(np.ones((2, 4, D)), mask=np.ones(3, bool))
