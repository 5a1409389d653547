"""One token, or a few: row by row, whatever the number of experts."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import layers, models
from keras_moe.functional import few_rows
from tests.helpers import assert_value_and_gradients, dense_gates
from tests.oracles import mixture as oracle

E, D, H = 48, 4, 3


@pytest.fixture
def weights(rng):
    kernels = [rng.normal(size=(E, D, H)), rng.normal(size=(E, H, D + 1))]
    return kernels, [rng.normal(size=(E, H)), rng.normal(size=(E, D + 1))]


@pytest.mark.parametrize(
    "indices", [[[47]], [[3, 0]], [[5], [5], [2]], [[0, 1, 47]]], ids=str
)
def test_it_equals_the_oracle(weights, rng, indices, monkeypatch):
    kernels, biases = weights
    indices = np.array(indices, "int32")
    number, k = indices.shape
    plan = F.make_dispatch_plan(indices, E)
    called = []
    run = few_rows.run_row_by_row
    monkeypatch.setattr(
        "keras_moe.functional.experts.run_row_by_row",
        lambda *arguments: called.append(1) or run(*arguments),
    )

    def mix(x, gates, *w):
        return F.mix_feed_forward_experts(x, gates, plan, w[:2], w[2:], tf.nn.tanh)

    def expected(x, gates, *w):
        dense = dense_gates(gates, indices, E)
        return oracle.mixture(x, dense, w[:2], w[2:], np.tanh)

    x, gates = rng.normal(size=(number, D)), rng.uniform(0.1, 1.0, size=(number, k))
    assert_value_and_gradients(mix, expected, [x, gates, *kernels, *biases])
    assert called


def test_gradients_are_dense(weights):
    kernels = [tf.constant(each) for each in weights[0]]
    plan = F.make_dispatch_plan(tf.constant([[3, 0]]), E)
    with tf.GradientTape() as tape:
        tape.watch(kernels)
        gates = tf.ones((1, 2), tf.float64)
        y = F.mix_feed_forward_experts(
            tf.ones((1, D), tf.float64), gates, plan, kernels
        )
    for gradient, kernel in zip(tape.gradient(y, kernels), kernels, strict=True):
        assert isinstance(gradient, tf.Tensor)
        assert gradient.shape == kernel.shape


@pytest.mark.parametrize(
    ("rows", "num_experts", "few"),
    [(1, 15, False), (1, 16, True), (4, 64, True), (5, 64, False), (17, 999, False)],
)
def test_what_is_few(rows, num_experts, few):
    assert few_rows.are_few(tf.zeros((rows, 2)), num_experts) is few


def test_rows_of_an_unknown_number_are_not_few():
    @tf.function(input_signature=[tf.TensorSpec([None, 2])])
    def answer(rows):
        return tf.constant(few_rows.are_few(rows, 999))

    assert not answer(tf.zeros((1, 2)))


def outputs(kind, rows, **options):
    """What a layer makes of the first rows of 12, within a graph of so many rows."""
    keras.utils.set_random_seed(0)
    experts = kind(E, 8, use_bias=True, **options)
    moe = layers.MoE(experts, layers.TopKGating(k=2, gate_initializer="glorot_uniform"))
    x = np.random.default_rng(0).standard_normal((12, 6), "float32")
    moe(x)
    return tf.function(moe)(tf.constant(x[:rows]))


@pytest.mark.parametrize("kind", [layers.FeedForwardExperts, layers.GatedExperts])
@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
def test_a_token_alone_is_answered_as_among_others(kind, dtype):
    alone, among = outputs(kind, 1, dtype=dtype), outputs(kind, 12, dtype=dtype)
    tolerance = 0.02 if dtype == "mixed_bfloat16" else 1e-5
    np.testing.assert_allclose(
        tf.cast(alone[0], "float32"), tf.cast(among[0], "float32"), atol=tolerance
    )


def test_kernels_of_eight_bits_with_a_low_rank_addition():
    keras.utils.set_random_seed(0)
    experts = layers.FeedForwardExperts(E, 8)
    moe = layers.MoE(experts, layers.TopKGating(k=2, gate_initializer="glorot_uniform"))
    x = np.random.default_rng(0).standard_normal((12, 6), "float32")
    moe(x)
    experts.quantize("int8")
    experts.enable_lora(2, b_initializer="he_uniform")

    def gradients(rows):
        with tf.GradientTape() as tape:
            y = moe(x[:rows])
            loss = tf.reduce_sum(y[:1] ** 2)
        return y[0], tape.gradient(loss, experts.trainable_variables)

    (alone, own), (among, others) = gradients(1), gradients(12)
    np.testing.assert_allclose(alone, among, atol=1e-5)
    for a, b in zip(own, others, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_graph_does_not_grow_with_the_experts():
    def size(num_experts):
        keras.utils.set_random_seed(0)
        moe = layers.MoE(
            layers.FeedForwardExperts(num_experts, 8), layers.TopKGating(k=2)
        )
        graph = tf.function(moe).get_concrete_function(tf.ones((1, 6))).graph
        return len(graph.get_operations())

    assert size(64) == size(256)


def test_words_one_by_one_are_those_of_the_whole_text():
    """A language model decodes with the layer's graph of one token."""
    keras.utils.set_random_seed(0)
    middle = models.middle_layers("moe", units=8, hidden_units=8, num_experts=32, k=2)
    model = models.MoELanguageModel(20, 8, middle=middle)
    words = np.random.default_rng(0).integers(0, 20, (1, 12))
    whole = model(words)
    assert whole.shape[1] * 2 > 16
    np.testing.assert_allclose(model(words[:, :1])[:, 0], whole[:, 0], atol=1e-5)
