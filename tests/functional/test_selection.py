"""A table of gates as a result, in the form of every engine."""

import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import engine, layers
from tests import own_layers
from tests.helpers import assert_value_and_gradients

N, E, D = 7, 5, 4


@pytest.fixture
def table(rng):
    gates = rng.random((N, E))
    selected = gates > 0.4
    selected[2] = False
    return gates, selected


def kept_by_loops(selected, most):
    kept = np.zeros_like(selected)
    for token, row in enumerate(selected):
        for expert in np.nonzero(row)[0][:most]:
            kept[token, expert] = True
    return kept


def as_table(result):
    """`(N, E)` gates of a result of any form."""
    gates = np.zeros((N, E))
    chosen = np.asarray(result.expert_indices)
    if result.is_ragged:
        gates[np.asarray(result.token_indices), chosen] = result.gates
        return gates
    tokens, columns = np.nonzero(chosen >= 0)
    gates[tokens, chosen[tokens, columns]] = np.asarray(result.gates)[tokens, columns]
    return gates


@pytest.fixture(params=["here", "static"])
def form(request, monkeypatch):
    if request.param == "static":
        monkeypatch.setattr(engine, "current", engine.StaticEngine)
    return request.param


@pytest.mark.parametrize("most", [None, 1, 2, E])
@pytest.mark.parametrize("masked", [False, True])
def test_both_forms_hold_the_table(table, form, most, masked, rng):
    gates, selected = table
    mask = rng.random(N) < 0.6 if masked else None
    result = F.make_selection_result(gates, selected, most_experts=most, mask=mask)
    assert result.is_ragged == (form == "here")
    if form == "static":
        assert result.gates.shape == (N, most or E)
    wanted = selected if mask is None else selected & mask[:, np.newaxis]
    wanted = kept_by_loops(wanted, most or E)
    expected = np.where(wanted, gates, 0.0)
    np.testing.assert_allclose(as_table(result), expected)
    np.testing.assert_array_equal(result.statistics.counts, wanted.sum(axis=0))
    np.testing.assert_allclose(result.statistics.importance, expected.sum(axis=0))


@pytest.mark.parametrize("most", [None, 2])
def test_gradients_reach_the_gates_that_are_used(table, form, most):
    gates, selected = table

    def value(gates):
        result = F.make_selection_result(gates, selected, most_experts=most)
        return result.statistics.importance**2

    def oracle(gates):
        kept = kept_by_loops(selected, most or E)
        return np.sum(np.where(kept, gates, 0.0), axis=0) ** 2

    assert_value_and_gradients(value, oracle, [gates])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selected": np.ones((N, E + 1), bool)}, "selected"),
        ({"most_experts": E + 1}, "k=6|most_experts"),
        ({"most_experts": 0}, "most_experts|`k`"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    arguments = {"gates": np.ones((N, E), "f4"), "selected": np.ones((N, E), bool)}
    with pytest.raises(ValueError, match=message):
        F.make_selection_result(**{**arguments, **options})


@pytest.mark.parametrize("factor", [None, 0.5])
def test_an_own_gate_is_the_same_compiled(factor, rng):
    layer = layers.MoE(
        layers.FeedForwardExperts(E, 3),
        own_layers.AboveGating(),
        capacity_factor=factor,
    )
    tokens = tf.constant(rng.normal(size=(N, D)), tf.float32)
    expected = layer(tokens, training=True)
    compiled = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    np.testing.assert_allclose(compiled(tokens), expected, rtol=1e-5, atol=1e-6)
