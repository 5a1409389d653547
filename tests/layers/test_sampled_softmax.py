"""The sampled softmax: oracle, unbiasedness, use in a model."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional, layers, models, telemetry
from tests.helpers import assert_value_and_gradients
from tests.oracles import sampled_softmax as oracle

N, D, V = 6, 3, 12
TARGETS = np.array([0, 1, 5, 11, 5, 2])
CANDIDATES = np.array([0, 5, 3, 7])  # 0 and 5 are targets of some rows
EXPECTED = np.array([0.9, 0.3, 0.5, 0.2])


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, D)), rng.normal(size=(V, D)), rng.normal(size=V)


def test_equals_the_oracle_in_value_and_gradients():
    assert_value_and_gradients(
        lambda x, w, b: functional.sampled_cross_entropy(
            x, w, b, TARGETS, tf.constant(CANDIDATES), tf.constant(EXPECTED)
        ),
        lambda x, w, b: oracle.sampled_cross_entropy(
            x, w, b, TARGETS, CANDIDATES, EXPECTED
        ),
        arrays(),
    )


def test_all_words_as_candidates_are_the_full_softmax():
    x, w, b = arrays(1)
    found = functional.sampled_cross_entropy(
        *map(tf.constant, (x, w, b)), TARGETS, tf.range(V, dtype=tf.int64), np.ones(V)
    )
    np.testing.assert_allclose(
        found, oracle.cross_entropy(x, w, b, TARGETS), rtol=1e-12
    )


def test_only_rows_that_are_read_get_a_gradient():
    x, w, b = map(tf.constant, arrays())
    with tf.GradientTape() as tape:
        tape.watch(w)
        loss = functional.sampled_cross_entropy(
            x, w, b, TARGETS, tf.constant(CANDIDATES), tf.constant(EXPECTED)
        )
    gradient = tape.gradient(loss, w)
    assert isinstance(gradient, tf.IndexedSlices)
    rows = np.abs(tf.convert_to_tensor(gradient)).sum(axis=1)
    assert set(np.flatnonzero(rows)) == set(TARGETS) | set(CANDIDATES)


def draws(layer, number):
    """Candidates and expected counts of many draws, in one graph."""

    @tf.function
    def draw():
        found = [layer.sample() for _ in range(50)]
        return tf.stack([c for c, _ in found]), tf.stack([q for _, q in found])

    parts = [draw() for _ in range(number // 50)]
    return (np.concatenate([p[i] for p in parts]) for i in range(2))


def standard_errors(samples, wanted):
    """How many standard errors the mean of the samples is away, per element."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return np.abs(samples.mean(axis=0) - wanted) / np.maximum(error, 1e-12)


def test_the_normalizer_is_estimated_without_bias():
    keras.utils.set_random_seed(0)
    vocabulary, number = 40, 10_000
    layer = layers.SampledSoftmax(vocabulary, num_sampled=15)
    candidates, expected = draws(layer, number)
    assert candidates.shape == expected.shape == (number, 15)
    assert all(len(set(row)) == 15 for row in candidates[:100])
    rng = np.random.default_rng(0)
    numerators = np.exp(rng.normal(size=vocabulary))  # of the words' softmax
    estimates = np.sum(numerators[candidates] / expected, axis=1)
    assert standard_errors(estimates, numerators.sum()) < 4
    # It would be seen: without the correction it is far off.
    plain = np.sum(numerators[candidates], axis=1) * vocabulary / 15
    assert standard_errors(plain, numerators.sum()) > 6


def test_loss_and_gradients_are_those_of_the_full_softmax_on_average():
    keras.utils.set_random_seed(1)
    vocabulary, number = 200, 2_000
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, D))
    w, b = 0.3 * rng.normal(size=(vocabulary, D)), 0.1 * rng.normal(size=vocabulary)
    targets = np.array([0, 3, 40, 150])
    layer = layers.SampledSoftmax(vocabulary, num_sampled=150)
    candidates, expected = draws(layer, number)
    variables = [tf.constant(a) for a in (x, w, b)]

    @tf.function
    def loss_and_gradients(candidates, expected):
        with tf.GradientTape() as tape:
            tape.watch(variables)
            loss = tf.reduce_sum(
                functional.sampled_cross_entropy(
                    *variables, targets, candidates, tf.cast(expected, tf.float64)
                )
            )
        gradients = tape.gradient(loss, variables)
        flat = [tf.reshape(tf.convert_to_tensor(g), [-1]) for g in gradients]
        return tf.concat([loss[tf.newaxis], *flat], axis=0)

    def samples(expected):
        return np.array(
            [
                loss_and_gradients(c, q)
                for c, q in zip(candidates, expected, strict=True)
            ]
        )

    with tf.GradientTape() as tape:
        tape.watch(variables)
        full = tf.reduce_sum(
            tf.nn.sparse_softmax_cross_entropy_with_logits(
                targets,
                tf.matmul(variables[0], variables[1], transpose_b=True) + variables[2],
            )
        )
    gradients = [tf.reshape(g, [-1]) for g in tape.gradient(full, variables)]
    wanted = np.concatenate([[full], *gradients])
    drawn, wrong = samples(expected), samples(np.ones_like(expected))
    assert standard_errors(drawn, wanted)[0] < 4  # the loss
    assert standard_errors(wrong, wanted)[0] > 20
    # The gradients in twelve random directions. A bias anywhere shows in most of
    # them, and of twelve normal deviates one above 4 comes once in 1,300 times.
    directions = rng.normal(size=(wanted.size - 1, 12))
    assert (
        np.max(standard_errors(drawn[:, 1:] @ directions, wanted[1:] @ directions)) < 4
    )
    found = standard_errors(wrong[:, 1:] @ directions, wanted[1:] @ directions)
    assert np.sum(found > 4) > 6
    # And one by one: of the largest of 813 normal deviates 4 is the 95th percentile.
    assert np.mean(standard_errors(drawn, wanted) > 4) < 0.005


def test_inference_is_by_the_full_softmax():
    x, w, b = (a.astype("float32") for a in arrays())
    layer = layers.SampledSoftmax(V, num_sampled=4)
    layer.build((None, D))
    layer.set_weights([w, b])
    np.testing.assert_allclose(layer(x), x @ w.T + b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        layer(x, targets=TARGETS), oracle.cross_entropy(x, w, b, TARGETS), rtol=1e-5
    )
    sampled = layer(x, targets=TARGETS, training=True)
    assert sampled.shape == (N,)
    assert np.any(sampled != layer(x, targets=TARGETS, training=True))


def test_half_precision_computes_in_float32():
    layer = layers.SampledSoftmax(V, num_sampled=4, dtype="mixed_float16")
    x = tf.cast(arrays()[0], tf.float16)
    assert layer(x).dtype == tf.float32
    assert layer(x, targets=TARGETS, training=True).dtype == tf.float32


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_sampled=12, vocabulary_size=12"):
        layers.SampledSoftmax(12, num_sampled=12)
    layer = layers.SampledSoftmax(12, num_sampled=3)
    with pytest.raises(ValueError, match="dtype=float32"):
        layer(np.ones((2, 3), "float32"), targets=np.ones(2, "float32"))


def language_model(num_sampled=20, **options):
    return models.MoELanguageModel(
        40,
        8,
        middle=layers.MoE(
            layers.FeedForwardExperts(4, hidden_units=8), layers.NoisyTopKGating(k=2)
        ),
        num_sampled=num_sampled,
        dropout=0.0,
        **options,
    )


def compiled(model, loss=None):
    model.compile(
        keras.optimizers.Adam(0.01),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[telemetry.Perplexity()],
    )
    return model


def text(rows=8):
    tokens = np.tile(np.arange(1, 9, dtype="int32"), (rows, 1))
    tokens[:, -2:] = 0  # padding
    return tokens, np.roll(tokens, -1, axis=1), (tokens > 0).astype("float32")


def test_a_language_model_trains_on_the_sample_and_evaluates_on_everything():
    keras.utils.set_random_seed(0)
    model = compiled(language_model())
    x, y, weights = text()
    history = model.fit(
        x, y, sample_weight=weights, epochs=40, verbose=0, validation_split=0.25
    ).history
    # Perplexity in training would need all logits; the balance is there.
    assert "perplexity" not in history
    assert "val_perplexity" in history
    assert any(key.endswith("load_cv") for key in history)
    assert history["val_perplexity"][-1] < 0.5 * history["val_perplexity"][0]
    logs = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x))
    exact = np.exp(np.sum(losses * weights) / weights.sum())
    np.testing.assert_allclose(logs["perplexity"], exact, rtol=1e-4)


def test_the_loss_of_fit_with_all_words_sampled_equals_the_full_one():
    x, y, weights = text()
    found = {}
    for name, num_sampled in (("full", None), ("sampled", 39)):
        keras.utils.set_random_seed(0)
        model = compiled(language_model(num_sampled))
        model.build((8, 8))
        kernel = np.random.default_rng(0).normal(size=(40, 8)).astype("float32")
        kernel_of = model.softmax.kernel
        kernel_of.assign(kernel if num_sampled else kernel.T)
        for gate in (model.moe_layers[0].gating,):
            gate.noise_epsilon = 0.0
            gate.noise_kernel.assign(-1e3 * np.ones(gate.noise_kernel.shape))
        found[name] = model.train_on_batch(x, y, weights, return_dict=True)["loss"]
    # All words but one, which is a rare one or a target, of 40.
    np.testing.assert_allclose(found["sampled"], found["full"], rtol=0.03)


def test_no_logits_are_computed_in_a_training_step():
    model = compiled(language_model(num_sampled=7))
    x, y, weights = map(tf.constant, text(rows=5))

    @tf.function
    def step(x, y, weights):
        return model.train_step((x, y, weights))

    step(x, y, weights)
    graph = step.get_concrete_function(x, y, weights).graph
    logits = [
        op
        for op in graph.get_operations()
        if any(t.shape.rank == 3 and t.shape[-1] == 40 for t in op.outputs)
    ]
    assert logits  # they are in the graph as traced ...
    used, stack = set(), [t.op for t in graph.outputs]
    stack += [op for op in graph.get_operations() if op.op_def.is_stateful]
    while stack:
        op = stack.pop()
        if op not in used:
            used.add(op)
            stack += [t.op for t in op.inputs] + list(op.control_inputs)
    assert not used & set(logits)  # ... and nothing that runs needs them


def test_another_loss_is_refused():
    for loss in ("mse", keras.losses.SparseCategoricalCrossentropy()):
        with pytest.raises(ValueError, match="num_sampled"):
            compiled(language_model(), loss).train_on_batch(*text())


def test_saved_and_loaded_it_goes_on(tmp_path):
    model = compiled(language_model())
    x, y, weights = text()
    model.fit(x, y, sample_weight=weights, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6)
    assert loaded.num_sampled == 20
    loaded.fit(x, y, sample_weight=weights, verbose=0)
