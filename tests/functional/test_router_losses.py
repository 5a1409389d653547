"""Losses of later routers, and what noise leaves of a gate's choices."""

import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import serving
from tests.helpers import assert_value_and_gradients
from tests.oracles import mixture as oracle

N, E, K = 7, 6, 2
MASK = np.array([1, 1, 0, 1, 0, 1, 1], bool)


def in_form(form, function, *arguments):
    """Run as it is, compiled by XLA, or in the operations of GPUs."""
    if form == "eager":
        return function(*arguments)
    if form == "xla":
        return tf.function(function, jit_compile=True)(*arguments)
    with serving.gpu_operations():
        return tf.function(function)(*arguments)


@pytest.mark.parametrize("mask", [None, MASK])
def test_router_z_loss_equals_the_oracle(rng, mask):
    real = slice(None) if mask is None else mask
    assert_value_and_gradients(
        lambda v: F.router_z_loss(v, mask, 0.3),
        lambda v: 0.3 * oracle.router_z_loss(v[real]),
        [3.0 * rng.normal(size=(N, E))],
    )


def test_router_z_loss_of_a_worked_example():
    # log(e^0 + e^0) = log 2; log(e^1) + log 2 = 1 + log 2; padding is left out.
    logits = tf.constant([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    found = F.router_z_loss(logits, [True, True, False], weight=2.0)
    assert float(found) == pytest.approx(np.log(2) ** 2 + (1 + np.log(2)) ** 2)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("k", [1, K])
def test_switch_loss_equals_the_oracle(rng, k, mask):
    real = slice(None) if mask is None else mask
    probabilities = rng.uniform(0.1, 1.0, size=(N, E))
    chosen = np.argsort(-probabilities, axis=1)[real, :k]
    counts = np.bincount(chosen.ravel(), minlength=E)
    assert_value_and_gradients(
        lambda p: F.switch_loss(p, counts, mask, 0.3),
        lambda p: 0.3 * oracle.switch_loss(p[real], counts),
        [probabilities],
    )


def test_switch_loss_is_its_weight_at_balance_and_highest_at_collapse():
    uniform = tf.fill((8, 4), 0.25)
    assert float(F.switch_loss(uniform, [4, 4, 4, 4], weight=0.5)) == 0.5
    one = tf.one_hot([2] * 8, 4)
    assert float(F.switch_loss(one, [0, 0, 8, 0])) == 4.0


def test_losses_of_no_tokens_are_zero_with_zero_gradient():
    logits = tf.zeros((3, E))
    with tf.GradientTape() as tape:
        tape.watch(logits)
        none = [False] * 3
        probabilities = tf.nn.softmax(logits)
        total = F.router_z_loss(logits, none) + F.switch_loss(
            probabilities, [0] * E, none
        )
    assert float(total) == 0.0
    np.testing.assert_array_equal(tape.gradient(total, logits), np.zeros((3, E)))
    assert float(F.router_z_loss(tf.zeros((0, E)))) == 0.0


def test_what_padding_holds_is_in_no_loss_and_no_gradient(rng):
    logits = rng.normal(size=(N, E)).astype("float32")
    logits[~MASK] = np.nan
    logits = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        total = F.router_z_loss(logits, MASK)
        total += F.switch_loss(tf.nn.softmax(logits), [2] * E, MASK)
    assert np.isfinite(total)
    gradient = tape.gradient(F.router_z_loss(logits, MASK), logits)
    assert gradient is None or np.isfinite(gradient).all()


def test_infinite_logits_give_a_finite_router_z_loss_and_gradient():
    logits = tf.constant([[np.inf, 0.0], [-np.inf, 1.0], [-np.inf, -np.inf]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = F.router_z_loss(logits)
    assert np.isfinite(loss)
    assert np.isfinite(tape.gradient(loss, logits)).all()


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_losses_of_half_precision_are_formed_in_float32(rng, dtype):
    logits = tf.cast(300.0 * rng.normal(size=(N, E)), dtype)  # squares overflow
    found = F.router_z_loss(logits)
    assert found.dtype == tf.float32
    lse = [max(row) for row in logits.numpy().astype("float64")]
    np.testing.assert_allclose(found, np.mean(np.square(lse)), rtol=1e-3)
    assert F.switch_loss(tf.nn.softmax(logits), [1] * E).dtype == tf.float32


@pytest.mark.parametrize("weight", [-0.1, np.nan])
def test_bad_weights_are_refused(weight):
    for loss in (
        lambda: F.router_z_loss(tf.ones((2, 3)), weight=weight),
        lambda: F.switch_loss(tf.ones((2, 3)), [1, 1, 1], weight=weight),
    ):
        with pytest.raises(ValueError, match="`weight`"):
            loss()


@pytest.mark.parametrize("form", ["eager", "xla", "gpu"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_choices_kept_equals_the_oracle(rng, k, form):
    # Whole numbers: many logits are equal, also at the border of the chosen.
    clean = rng.integers(0, 3, size=(40, E)).astype("float32")
    chosen = np.argsort(rng.normal(size=(40, E)), axis=1)[:, :k].astype("int32")
    mask = rng.random(40) < 0.7
    kept = np.array(oracle.choices_kept(clean, chosen.tolist()))
    assert k == E or 0 < kept.mean() < 1
    found = in_form(form, lambda a, b: F.choices_kept(a, b), clean, chosen)
    np.testing.assert_allclose(found, [kept.sum(), 40], rtol=1e-5)
    found = in_form(form, lambda a, b: F.choices_kept(a, b, mask), clean, chosen)
    np.testing.assert_allclose(found, [kept[mask].sum(), mask.sum()], rtol=1e-5)


def test_a_choice_by_lot_keeps_k_of_all():
    # A gate that begins at zero: without noise it would take experts 0 and 1.
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.normal(size=(4000, E)), axis=1)[:, :K].astype("int32")
    kept, tokens = F.choices_kept(np.zeros((4000, E), "float32"), chosen)
    # A share has a variance below 1 / 12: five standard errors.
    assert float(kept) / int(tokens) == pytest.approx(K / E, abs=5 * 0.29 / 4000**0.5)
