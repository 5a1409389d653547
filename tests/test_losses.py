"""Cross-entropy of tokens: oracle, Keras' loss, limits, a model trained with it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional, losses, models
from tests.helpers import assert_value_and_gradients
from tests.oracles.sampled_softmax import cross_entropy_of_logits

TARGETS = np.array([0, 3, 3, 6, 2])


def logits_of(seed=0):
    return np.random.default_rng(seed).normal(size=(5, 7)) * 4


def test_equals_the_oracle_in_value_and_gradients():
    assert_value_and_gradients(
        lambda x: functional.cross_entropy(x, TARGETS),
        lambda x: cross_entropy_of_logits(x, TARGETS),
        [logits_of()],
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_second_derivatives_are_those_of_the_softmax(jit_compile):
    x = tf.constant(logits_of(1))

    @tf.function(jit_compile=jit_compile)
    def hessian_of(function):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = function(x)
            squares = tf.reduce_sum(tf.square(inner.gradient(loss, x)))
        return outer.gradient(squares, x)

    p = tf.nn.softmax(x).numpy()
    d = p - np.eye(7)[TARGETS]
    # Of the sum of the squares of p - y: 2 (diag p - p p^T) (p - y).
    expected = 2 * p * (d - np.sum(p * d, axis=1, keepdims=True))
    found = hessian_of(lambda x: functional.cross_entropy(x, TARGETS))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_far_logits_neither_overflow_nor_vanish():
    logits = tf.constant([[1e4, -1e4, 0.0], [-np.inf, 2.0, 2.0]], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        found = functional.cross_entropy(logits, tf.constant([1, 2]))
    np.testing.assert_allclose(found, [2e4, np.log(2)], rtol=1e-6)
    gradient = tape.gradient(found, logits)
    np.testing.assert_allclose(gradient, [[1, -1, 0], [0, 0.5, -0.5]], atol=1e-6)


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_is_that_of_keras(rank, dtype):
    logits = np.random.default_rng(2).normal(size=(2, 3, 5)).astype("float32")
    logits = keras.ops.cast(logits, dtype)
    targets = np.array([[0, 4, 1], [2, 2, 3]])[..., np.newaxis][..., : rank - 2 or None]
    targets = targets if rank == 3 else targets[..., 0]
    weights = np.array([[1.0, 0.5, 0.0], [2.0, 1.0, 1.0]], "float32")
    found = losses.TokenCrossentropy()(targets, logits, weights)
    usual = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    np.testing.assert_allclose(found, usual(targets, logits, weights), rtol=1e-6)


@pytest.mark.parametrize("options", [{"from_logits": False}, {"ignore_class": 2}])
def test_what_it_does_not_do_is_left_to_keras(options):
    x = np.random.default_rng(3).uniform(0.1, 1, (2, 3, 5)).astype("float32")
    targets = np.array([[0, 4, 1], [2, 2, 3]])
    copy = losses.TokenCrossentropy.from_config(
        losses.TokenCrossentropy(**options).get_config()
    )
    usual = keras.losses.SparseCategoricalCrossentropy(
        **{"from_logits": True, **options}
    )
    np.testing.assert_allclose(copy(targets, x), usual(targets, x), rtol=1e-6)


def test_a_target_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`targets`"):
        functional.cross_entropy(np.zeros((1, 3), "float32"), np.array([3]))


def test_a_model_trained_with_it_is_the_same_and_reloads(tmp_path):
    tokens = np.random.default_rng(4).integers(1, 20, (8, 6))
    found = []
    for loss in (
        losses.TokenCrossentropy(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ):
        keras.utils.set_random_seed(0)
        model = models.MoELanguageModel(20, 8, dropout=0.0)
        model.compile("adam", loss)
        model.fit(tokens, tokens, epochs=2, verbose=0)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    model.compile("adam", losses.TokenCrossentropy())
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(copy.loss, losses.TokenCrossentropy)
    before, after = (m.evaluate(tokens, tokens, verbose=0) for m in (model, copy))
    assert before == pytest.approx(after, rel=1e-6)
