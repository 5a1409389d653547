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


def test_bytes():
    shards = topology.make_shards(7, 2)
    # 4 and 3 experts of 5 * 6 float32.
    assert topology.shard_bytes(shards, (7, 5, 6), 4).tolist() == [480, 360]
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
