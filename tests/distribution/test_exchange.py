"""Rows reach their experts in the order of one device, and come back."""

import functools
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import engine
from keras_moe.distribution import topology
from keras_moe.distribution.mirrored import dispatcher, exchange
from keras_moe.layers.noise import draw_rows


def _run(counts, shards, rows):
    """The exchange of all replicas at once: an all-to-all is a transposition."""
    num_replicas = shards.num_replicas
    routes = [exchange.make_route(counts, shards, r) for r in range(num_replicas)]
    sent = []

    def record(blocks):
        sent.append(blocks)
        return blocks

    for own, route in zip(rows, routes, strict=True):
        exchange.to_experts(own, route, record)
    arrived = [
        exchange.to_experts(
            rows[r], routes[r], lambda _, r=r: tf.stack([blocks[r] for blocks in sent])
        )
        for r in range(num_replicas)
    ]
    answers = []
    for own, route in zip(arrived, routes, strict=True):
        exchange.from_experts(
            own * 2, route, lambda blocks: (answers.append(blocks), blocks)[1]
        )
    back = [
        exchange.from_experts(
            arrived[r],
            routes[r],
            lambda _, r=r: tf.stack([blocks[r] for blocks in answers]),
        )
        for r in range(num_replicas)
    ]
    return routes, sent, arrived, back


@pytest.mark.parametrize(
    ("num_experts", "num_replicas"), [(8, 2), (7, 3), (7, 4), (2, 3), (5, 1)]
)
def test_rows_arrive_sorted_by_expert_and_return(num_experts, num_replicas, rng):
    shards = topology.make_shards(num_experts, num_replicas)
    counts = rng.integers(0, 5, (num_replicas, num_experts)).astype("int32")
    counts[-1] = 0  # a replica without a token
    counts[:, 0] = 0  # an expert without a token
    names = [
        [
            (expert, replica, j)
            for expert in range(num_experts)
            for j in range(c[expert])
        ]
        for replica, c in enumerate(counts)
    ]
    rows = [tf.constant(np.reshape(n, (-1, 3)), tf.float32) for n in names]
    routes, sent, arrived, back = _run(counts, shards, rows)
    for replica in range(num_replicas):
        own = shards.experts_of(replica)
        # On one device: by expert, then by replica, then in order.
        wanted = sorted(n for some in names for n in some if n[0] in own)
        np.testing.assert_array_equal(
            arrived[replica], np.reshape(wanted, (-1, 3)).astype("float32")
        )
        np.testing.assert_array_equal(
            routes[replica].counts, counts[:, own.start : own.stop].sum(0)
        )
        np.testing.assert_array_equal(back[replica], 2 * rows[replica])
    # The least padding with blocks of one length: that of the fullest.
    fullest = max(
        counts[:, shards.experts_of(r).start : shards.experts_of(r).stop].sum(1).max()
        for r in range(num_replicas)
    )
    assert {blocks.shape[1] for blocks in sent} == {max(fullest, 1)}


def test_gradients_travel_back_the_same_way():
    shards = topology.make_shards(3, 1)
    counts = tf.constant([[2, 0, 1]])
    route = exchange.make_route(counts, shards, 0)
    rows = tf.constant([[1.0], [2.0], [3.0]])
    weights = tf.constant([[5.0], [7.0], [11.0]])
    with tf.GradientTape() as tape:
        tape.watch(rows)
        there = exchange.to_experts(rows, route, tf.identity)
        back = exchange.from_experts(there * there, route, tf.identity)
        total = tf.reduce_sum(weights * back)
    # d/dx of w x^2 is 2 w x.
    np.testing.assert_allclose(tape.gradient(total, rows), [[10.0], [28.0], [66.0]])


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_rows_are_numbered_as_on_one_device(group_size, rng):
    shards = topology.make_shards(7, 4, group_size=group_size)
    counts = rng.integers(0, 5, (4, 7)).astype("int32")
    counts[2] = 0  # a replica without a token
    # One device: sorted by expert, then by replica.
    names = [(e, r, j) for e in range(7) for r in range(4) for j in range(counts[r, e])]
    for replica in range(4):
        members = shards.members_of(shards.group_of(replica))
        own = shards.experts_of(replica)
        wanted = [i for i, (e, r, _) in enumerate(names) if e in own and r in members]
        first = dispatcher._first_rows(tf.constant(counts), shards, replica)
        lengths = counts[members.start : members.stop, own.start : own.stop].sum(0)
        if group_size == 4:
            assert first.shape.rank == 0  # one run follows the other
            first, lengths = [first], [lengths.sum()]
        assert len(first) == len(lengths)
        found = [
            int(f) + i for f, n in zip(first, lengths, strict=True) for i in range(n)
        ]
        assert found == wanted


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_runs_of_rows_are_those_of_the_whole_draw(kind, dtype, monkeypatch):
    seed = keras.random.SeedGenerator(3)
    whole = getattr(keras.random, kind)((40, 5), dtype=dtype, seed=seed)
    several = engine.Engine()
    several.replicas = mock.Mock(number=2)
    monkeypatch.setattr(engine, "current", lambda: several)
    draw = functools.partial(
        draw_rows, None, 5, dtype, keras.random.SeedGenerator(3), kind=kind
    )
    first, counts = tf.constant([4, 31, 0]), tf.constant([3, 0, 2])
    rows = draw(first_row=first, counts=counts)
    np.testing.assert_array_equal(rows, np.array(whole)[[4, 5, 6, 0, 1]])
    assert draw(first_row=first[:0], counts=counts[:0]).shape == (0, 5)
