"""What fits into a capacity on several devices is what fits on one."""

import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional
from keras_moe.distribution.dtensor import exchange, queue
from keras_moe.distribution.mirrored import capacity
from keras_moe.types import CountedStatistics, GatingResult


def fitting_by_loops(chosen, limit, num_experts):
    """First choices before second ones, earlier tokens before later ones."""
    taken, kept = np.zeros(num_experts, int), np.zeros(chosen.shape, bool)
    for choice in range(chosen.shape[1]):
        for token, expert in enumerate(chosen[:, choice]):
            if expert >= 0:
                kept[token, choice] = taken[expert] < limit
                taken[expert] += 1
    return kept


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (5, 0, 6), (0, 0, 1, 2)])
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_replicas_keep_what_one_device_keeps(sizes, limit, rng):
    num_experts, k = 4, 3
    chosen = rng.integers(-1, num_experts, (sum(sizes), k)).astype("int32")
    parts = np.split(chosen, np.cumsum(sizes)[:-1])
    counts = tf.stack(
        [
            capacity.ranks_within_choices(tf.constant(part), num_experts)[1]
            for part in parts
        ]
    )
    kept = [
        capacity.fitting(tf.constant(part), counts, replica, tf.constant(limit))
        for replica, part in enumerate(parts)
    ]
    expected = fitting_by_loops(chosen, limit, num_experts)
    np.testing.assert_array_equal(np.concatenate(kept), expected)
    # The plan of one device says the same.
    plan = functional.make_capacity_plan(chosen, num_experts, 100, limit=limit)
    np.testing.assert_array_equal(plan.positions >= 0, expected)


class Together:
    """Replicas, all of them in one process."""

    def __init__(self, index, sent):
        self.index, self._sent = index, sent

    def gather(self, value):
        if self._sent is None:
            raise StopIteration(value)
        return tf.stack(self._sent)


def sent_by(result, limits, num_tokens):
    try:
        capacity.without_dropped(result, limits, num_tokens, Together(0, None))
    except StopIteration as asked:
        return asked.value
    raise AssertionError


@pytest.mark.parametrize("factor", [0.4, 0.7, 5.0])
def test_the_capacity_is_that_of_all_tokens(factor, rng):
    num_experts, sizes = 4, (5, 0, 6)
    limits = capacity.Capacity(factor)
    chosen = rng.integers(0, num_experts, (sum(sizes), 2)).astype("int32")
    gates = rng.random(chosen.shape).astype("float32")
    zeros = tf.zeros([num_experts])
    statistics = CountedStatistics(zeros, zeros, tf.zeros([num_experts], tf.int32))
    ends = np.cumsum(sizes)[:-1]
    results = [
        GatingResult(tf.constant(g), tf.constant(c), statistics)
        for g, c in zip(np.split(gates, ends), np.split(chosen, ends), strict=True)
    ]
    sent = [
        sent_by(r, limits, tf.constant(n)) for r, n in zip(results, sizes, strict=True)
    ]
    limit = functional.expert_capacity(sum(sizes), num_experts, 2, factor)
    expected = fitting_by_loops(chosen, int(limit), num_experts)
    dropped = 0
    for replica, (result, own) in enumerate(
        zip(results, np.split(expected, ends), strict=True)
    ):
        kept, overflow = capacity.without_dropped(
            result, limits, tf.constant(sizes[replica]), Together(replica, sent)
        )
        tokens, choices = np.nonzero(own)
        np.testing.assert_array_equal(kept.token_indices, tokens)
        np.testing.assert_array_equal(
            kept.expert_indices, result.expert_indices.numpy()[tokens, choices]
        )
        np.testing.assert_array_equal(kept.gates, result.gates.numpy()[tokens, choices])
        dropped += int(overflow)
    assert dropped == np.sum(~expected)


@pytest.mark.parametrize(("num_tokens", "factor"), [(1, 0.1), (7, 1.25), (64, 9.0)])
def test_a_mesh_has_the_slots_of_one_device(num_tokens, factor):
    wanted = functional.expert_capacity(num_tokens, 5, 2, factor)
    assert queue.capacity_of(num_tokens, 5, 2, factor) == int(wanted)
    numbers = exchange.slot_numbers(num_tokens, 5, 2, most=int(wanted))
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == int(wanted)
