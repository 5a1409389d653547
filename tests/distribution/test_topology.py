"""Arithmetic of shards."""

import ast
from pathlib import Path

import numpy as np
import pytest

from keras_moe.distribution import topology


@pytest.mark.parametrize("num_experts", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("num_replicas", [1, 2, 3, 4, 9])
def test_every_expert_has_one_replica_and_shares_are_even(num_experts, num_replicas):
    shards = topology.make_shards(num_experts, num_replicas)
    found = [e for r in range(num_replicas) for e in shards.experts_of(r)]
    assert found == list(range(num_experts))
    assert shards.sizes.max() - shards.sizes.min() <= 1
    owners = shards.owners()
    for r in range(num_replicas):
        assert np.flatnonzero(owners == r).tolist() == list(shards.experts_of(r))


def test_first_replicas_hold_more():
    # 7 = 2 + 2 + 2 + 1
    assert topology.make_shards(7, 4).sizes.tolist() == [2, 2, 2, 1]
    assert topology.make_shards(7, 4).starts.tolist() == [0, 2, 4, 6]
    assert topology.make_shards(2, 3).sizes.tolist() == [1, 1, 0]


def test_groups_stay_together():
    # 5 groups of 4 on 3 replicas: 2, 2 and 1 groups.
    shards = topology.make_shards(20, 3, together=4)
    assert shards.sizes.tolist() == [8, 8, 4]
    for group in range(5):
        assert len(set(shards.owners()[group * 4 : group * 4 + 4])) == 1


def test_each_group_of_replicas_holds_all_experts():
    # Six replicas in groups of three: 7 = 3 + 2 + 2, twice.
    shards = topology.make_shards(7, 6, group_size=3)
    assert (shards.num_replicas, shards.num_groups, shards.group_size) == (6, 2, 3)
    found = [list(shards.experts_of(r)) for r in range(6)]
    assert found == [[0, 1, 2], [3, 4], [5, 6]] * 2
    assert shards.owners().tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert [shards.group_of(r) for r in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [shards.position_of(r) for r in range(6)] == [0, 1, 2, 0, 1, 2]
    assert shards.members_of(1) == range(3, 6)
    assert topology.make_shards(4, 2, group_size=1).experts_of(1) == range(4)


def test_replicas_that_hold_all_experts():
    shards = topology.make_shards(7, 12, group_size=3)
    assert shards.whole_group_in(range(0, 4)) == range(0, 3)
    # Two of one group and two of the next.
    assert shards.whole_group_in(range(4, 8)) is None
    assert shards.whole_group_in(range(8, 12)) == range(9, 12)
    assert shards.whole_group_in(range(3, 5)) is None


def test_bytes_of_groups():
    shards = topology.make_shards(7, 4, group_size=2)
    held = topology.shard_bytes(shards, (7, 5, 6), 4)
    assert held.tolist() == [480, 360] * 2
    # A ring of two holders: each sends half of it twice.
    assert topology.gradient_bytes(shards, held).tolist() == held.tolist()
    one = topology.make_shards(7, 4)
    assert not topology.gradient_bytes(one, np.array([480] * 4)).any()
    # 100 tokens * 4 rows / 4 replicas, half of them leave in groups of two.
    assert topology.exchange_bytes(100, 4, 8, 4, 4, 2) == 4 * 50 * 8 * 4
    assert topology.exchange_bytes(100, 4, 8, 4, 4, 1) == 0


def test_bytes():
    shards = topology.make_shards(7, 2)
    # 4 and 3 experts of 5 * 6 float32.
    assert topology.shard_bytes(shards, (7, 5, 6), 4).tolist() == [480, 360]
    # 4 and 3 columns of 5 float32.
    assert topology.shard_bytes(shards, (5, 7), 4, axis=1).tolist() == [80, 60]
    # 100 tokens * 4 rows / 2 replicas, half of them away, 8 floats, 4 times.
    assert topology.exchange_bytes(100, 4, 8, 4, 2) == 4 * 100 * 8 * 4
    assert topology.exchange_bytes(100, 4, 8, 4, 1) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "`num_experts` must be at least 1. Received: num_experts=0"),
        ((2, 0), "`num_replicas` must be at least 1. Received: num_replicas=0"),
        ((2, 2, 0), "`together` must be at least 1. Received: together=0"),
        ((7, 2, 2), "together=2, num_experts=7"),
        ((8, 4, 1, 3), "group_size=3, num_replicas=4"),
        ((8, 4, 1, 0), "`group_size` must be at least 1. Received: group_size=0"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        topology.make_shards(*arguments)


def test_topology_imports_neither_tensorflow_nor_keras():
    tree = ast.parse(Path(topology.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        assert not {n.split(".")[0] for n in names} & {"tensorflow", "keras"}
