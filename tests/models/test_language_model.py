import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import layers, models, telemetry

V, D = 30, 8
KINDS = ["moe", "moe_1_wide", "moe_1_deep", "4xlstm", "none"]


def make(kind="moe", stateful=False, **options):
    middle = models.middle_layers(kind, units=D, hidden_units=2 * D, num_experts=6, k=2)
    model = models.MoELanguageModel(V, D, middle=middle, stateful=stateful, **options)
    model.build((None, None))
    for layer in model.moe_layers:
        kernel = layer.gating.gate_kernel
        kernel.assign(np.random.default_rng(1).normal(size=kernel.shape))
    return model


def compiled(model):
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[telemetry.Perplexity()],
    )
    return model


@pytest.fixture
def tokens(rng):
    return rng.integers(1, V, size=(3, 12)).astype("int32")


def segments(tokens, length=4):
    return [tokens[:, i : i + length] for i in range(0, tokens.shape[1], length)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lstm_units", [None, 11])
def test_carried_state_equals_one_long_sequence(tokens, kind, lstm_units):
    model = make(kind, lstm_units=lstm_units)
    whole = model(tokens).numpy()
    cold = np.concatenate([model(part) for part in segments(tokens)], axis=1)
    model.stateful = True
    warm = np.concatenate([model(part) for part in segments(tokens)], axis=1)
    np.testing.assert_allclose(warm, whole, atol=1e-5)
    assert np.abs(cold - whole).max() > 1e-4
    model.reset_state()
    np.testing.assert_allclose(model(tokens[:, :4]), whole[:, :4], atol=1e-5)


def stream(tokens, rows):
    data = np.concatenate([part[:rows] for part in segments(tokens)])
    return tf.data.Dataset.from_tensor_slices((data, data)).batch(
        rows, drop_remainder=True
    )


def test_evaluation_repeats_and_batch_sizes_have_their_own_states(tokens):
    model = compiled(make(stateful=True))
    three, two = stream(tokens, 3), stream(tokens, 2)
    first = model.evaluate(three, verbose=0, return_dict=True)
    model.evaluate(two, verbose=0)
    model.predict(two, verbose=0)
    assert model.evaluate(three, verbose=0, return_dict=True) == first


def test_every_epoch_begins_with_zero_state(tokens):
    # With no learning, no dropout and no noise every epoch must be the same.
    model = make("none", stateful=True, dropout=0.0)
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = model.fit(
        stream(tokens, 3),
        epochs=3,
        verbose=0,
        shuffle=False,
        validation_data=stream(tokens, 3),
    ).history
    assert len(set(history["loss"])) == 1
    assert history["val_loss"] == history["loss"]


def test_states_are_not_saved_and_a_file_evaluates_at_any_batch_size(tokens, tmp_path):
    model = compiled(make(stateful=True))
    model.fit(stream(tokens, 3), verbose=0, shuffle=False)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert [w.shape for w in loaded.weights] == [w.shape for w in model.weights]
    for rows in (3, 2):
        np.testing.assert_array_equal(
            loaded.predict(stream(tokens, rows), verbose=0),
            model.predict(stream(tokens, rows), verbose=0),
        )


def test_padding_counts_in_no_loss_no_metric_and_no_balance(tokens):
    model = compiled(make())
    short = tokens[:, :5]
    padded = np.pad(short, [(0, 0), (0, 4)])
    whole = model.evaluate(short, short, verbose=0, return_dict=True)
    with_padding = model.evaluate(padded, padded, verbose=0, return_dict=True)
    for name, value in whole.items():
        assert with_padding[name] == pytest.approx(value, rel=1e-5), name


def test_generation_repeats_with_its_seed_and_avoids_forbidden_tokens(tokens):
    model = make()
    prompt = tokens[:, :2]
    first = model.generate(prompt, 20, seed=5, forbidden_tokens=range(20))
    np.testing.assert_array_equal(
        model.generate(prompt, 20, seed=5, forbidden_tokens=range(20)), first
    )
    assert (model.generate(prompt, 20, seed=6) != first).any()
    np.testing.assert_array_equal(first[:, :2], prompt)
    assert first.shape == (3, 22)
    assert first[:, 2:].min() >= 20


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}])
def test_greedy_generation_equals_a_loop_through_the_model(tokens, options):
    model = make()
    expected = tokens[:, :3]
    for _ in range(6):
        logits = model(expected).numpy()[:, -1]
        logits[:, 0] = -np.inf
        expected = np.concatenate([expected, logits.argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(
        model.generate(tokens[:, :3], 6, seed=0, **options), expected
    )


def test_routing_is_that_of_the_layer_in_the_model(tokens):
    model = make()
    seen = []
    gating = model.moe_layers[0].gating
    call = gating.call
    gating.call = lambda *args, **kwargs: seen.append(call(*args, **kwargs)) or seen[-1]
    model(tokens)
    experts, gates = model.routing(tokens)["moe"]
    assert experts.shape == gates.shape == (3, 12, 2)
    np.testing.assert_array_equal(
        experts.reshape(-1, 2), seen[0].expert_indices.numpy()
    )
    np.testing.assert_allclose(gates.reshape(-1, 2), seen[0].gates, rtol=1e-6)


def test_a_gate_of_varying_numbers_of_experts_is_shown_padded(tokens):
    class OneOrTwo(layers.TopKGating):
        """Odd tokens have one expert, even ones two."""

        def call(self, inputs, mask=None, training=None):
            from keras_moe import functional

            n = tf.shape(inputs)[0]
            numbers = tf.where(tf.range(n) % 2 == 0, 2, 1)
            tokens = tf.repeat(tf.range(n), numbers)
            gates = tf.ones_like(tokens, tf.float32)
            return functional.make_gating_result(
                gates, tokens % 3, 3, token_indices=tokens
            )

    moe = layers.MoE(
        layers.FeedForwardExperts(3, 4), OneOrTwo(k=1, normalization="all")
    )
    model = models.MoELanguageModel(V, D, middle=moe)
    experts, gates = model.routing(tokens[:1, :4])[moe.name]
    np.testing.assert_array_equal(experts, [[[0, 0], [1, -1], [2, 2], [0, -1]]])
    np.testing.assert_array_equal(gates, [[[1, 1], [1, 0], [1, 1], [1, 0]]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # At the paper's sizes: 4 * 2 * 512 * 1024 = 4,194,304 multiply-adds of
        # the experts of a token, and as many weights times num_experts / k.
        ("moe", 8 * 2 * 512 * 1024),
        ("moe_1_wide", 4 * 2 * 512 * 1024),
        ("moe_1_deep", 512 * 1024 + 3 * 1024 * 1024 + 1024 * 512),
    ],
)
def test_baselines_have_the_operations_of_the_mixture(kind, expected):
    (layer,) = models.middle_layers(kind, units=512, hidden_units=1024, num_experts=8)
    layer.build((None, 512))
    assert (
        sum(
            kernel.shape.num_elements()
            if hasattr(kernel.shape, "num_elements")
            else int(np.prod(kernel.shape))
            for kernel in layer.experts.kernels
        )
        == expected
    )


def test_four_lstms_have_two_in_the_middle():
    middle = models.middle_layers("4xlstm", units=512, hidden_units=1024)
    assert [type(layer) for layer in middle] == [keras.layers.LSTM] * 2
    # Two LSTMs of 4 * (512 + 512) * 512 multiply-adds: 4,194,304.
    assert 2 * 4 * (512 + 512) * 512 == 4 * 2 * 512 * 1024


def test_a_small_model_learns_a_cycle():
    model = compiled(make(stateful=True, dropout=0.0))
    tokens = (np.arange(4 * 40).reshape(4, 40) % (V - 1) + 1).astype("int32")
    inputs = np.concatenate(segments(tokens[:, :-1][:, :36], 6))
    targets = np.concatenate(segments(tokens[:, 1:][:, :36], 6))
    data = tf.data.Dataset.from_tensor_slices((inputs, targets)).batch(
        4, drop_remainder=True
    )
    history = model.fit(data, epochs=25, verbose=0, shuffle=False).history
    assert history["perplexity"][-1] < 0.4 * history["perplexity"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 0}, "vocabulary_size=0"),
        ({"units": -1}, "units=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"lstm_units": 0}, "lstm_units=0"),
        ({"middle": "moe"}, "`middle` must be a layer"),
        ({"middle": [keras.layers.LSTM(4)]}, "return_sequences=False"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.MoELanguageModel(**{"vocabulary_size": 10, "units": 4, **options})


def test_a_batch_size_that_changes_within_a_stream_is_refused(tokens):
    model = make(stateful=True)
    model(tokens)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="of one size within a stream"
    ):
        model(tokens[:2])
    model.reset_state()
    model(tokens[:2])


def test_bad_inputs_are_refused(tokens):
    model = make()
    with pytest.raises(ValueError, match=r"dtype=float32, shape=\(3, 12\)"):
        model(tokens.astype("float32"))
    with pytest.raises(ValueError, match=r"dtype=int32, shape=\(12,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(tokens[:, :0])
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.generate(tokens, 0)
    narrow = layers.MoE(layers.FeedForwardExperts(4, 4, output_units=3))
    with pytest.raises(ValueError, match="3 features, units=8"):
        models.MoELanguageModel(V, D, middle=narrow).build((None, None))
    with pytest.raises(ValueError, match="kind='transformer'"):
        models.middle_layers("transformer", units=4, hidden_units=4)


@pytest.mark.parametrize("lstm_units", [None, 11])
@pytest.mark.parametrize("num_sampled", [None, 4])
def test_a_policy_is_that_of_every_layer_and_of_the_reloaded_model(
    tokens, tmp_path, lstm_units, num_sampled
):
    model = make(
        "none", lstm_units=lstm_units, num_sampled=num_sampled, dtype="float64"
    )
    dtypes = {v.dtype for v in model.trainable_variables}
    assert dtypes == {"float64"}
    assert model(tokens).dtype == tf.float64
    model.save(tmp_path / "m.keras")
    reloaded = keras.saving.load_model(tmp_path / "m.keras")
    assert {v.dtype for v in reloaded.trainable_variables} == {"float64"}
    np.testing.assert_allclose(reloaded(tokens), model(tokens), rtol=1e-14)
    mixed = make("none", lstm_units=lstm_units, dtype="mixed_bfloat16")
    assert {v.dtype for v in mixed.trainable_variables} == {"float32"}
    assert mixed.first_lstm.cell.compute_dtype == "bfloat16"
    assert mixed(tokens).dtype == tf.float32


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_a_batch_of_nothing_gives_nothing(shape, stateful):
    model = make(stateful=stateful)
    tokens = np.zeros(shape, "int32")
    with tf.GradientTape() as tape:
        logits = model(tokens, training=True)
        loss = tf.reduce_sum(logits) + sum(model.losses)
    assert logits.shape == (*shape, V)
    for gradient in tape.gradient(loss, model.trainable_variables):
        assert np.isfinite(tf.convert_to_tensor(gradient)).all()
    state = [[tf.ones((shape[0], D))] * 2] * 2
    logits, after = model.call_with_state(tokens, state)
    assert logits.shape == (*shape, V)
    for each in tf.nest.flatten(after):  # no time has passed
        np.testing.assert_array_equal(each, np.ones((shape[0], D)))
    # Without static shapes too.
    if shape == (0, 5):
        model.reset_state()
        traced = tf.function(model, input_signature=[tf.TensorSpec([None, 5], "int32")])
        assert traced(tokens).shape == (0, 5, V)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_stateful_model_is_not_compiled_with_xla(policy):
    # Its states change their shape at the first batch, which XLA refuses.
    keras.config.set_dtype_policy(policy)
    model = models.MoELanguageModel(11, units=4, stateful=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with pytest.warns(UserWarning, match="jit_compile=False"):
        model.compile("sgd", loss, jit_compile=True)
    tokens = np.arange(24).reshape(4, 6) % 10 + 1
    history = model.fit(tokens, tokens, batch_size=2, shuffle=False, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert models.MoELanguageModel(11, units=4).supports_jit


@pytest.mark.parametrize("kind", [models.MoELanguageModel, models.MoETranslator])
@pytest.mark.parametrize("suffix", ["h5", "hdf5"])
def test_files_that_cannot_be_loaded_are_refused(kind, suffix, tmp_path):
    with pytest.raises(ValueError, match=r"`filepath`.*\.keras"):
        kind(20, 8).save(tmp_path / f"model.{suffix}")
    assert not list(tmp_path.iterdir())
