"""Weak scaling against sums made by hand."""

import dataclasses

import numpy as np
import pytest

from keras_moe import planning
from keras_moe.planning.weak_scaling import Scaling, ScalingPoint

CLUSTER = planning.Cluster("c", "d", None, 1000, 1, 0.5, 100, 2, 4, 20.0)


def test_sums_over_nodes_by_hand():
    quiet = dataclasses.replace(CLUSTER, message_microseconds=0.0)
    # Two of four devices of one node: each half once round and once back, at 20e9.
    assert quiet.reduction_seconds(8e9, 2) == pytest.approx(2 * 4e9 / 20e9)
    # Four nodes of four: 3/4 within, then a quarter over the network, 3/4 of it.
    expected = 2 * 6e9 / 20e9 + 2 * 2e9 * 0.75 / 2e9
    assert quiet.reduction_seconds(8e9, 16) == pytest.approx(expected)
    assert quiet.reduction_seconds(8e9, 1) == 0
    # Groups of four fill a node: the sums of experts all go over the network.
    assert quiet.far_reduction_seconds(8e9, 16, 4) == pytest.approx(2 * 6e9 / 2e9)
    # Four doublings, there and back, 20 microseconds each.
    assert CLUSTER.reduction_seconds(8e9, 16) - expected == pytest.approx(160e-6)


def test_a_preset_on_more_devices():
    plan = planning.plan("moe_256", CLUSTER, num_devices=16)
    found = planning.scaling(plan, 2048)
    assert [p.num_devices for p in found.points] == [1 << i for i in range(12)]
    one, sixteen = found.points[0], found.points[4]
    assert one.communication == 0
    assert one.efficiency == one.overlapped_efficiency == 1
    assert sixteen.seconds == pytest.approx(plan.step_time)
    sent = sum(plan.seconds[p] for p in ("exchange", "vocabulary", "reduction"))
    assert sixteen.communication == pytest.approx(sent)
    hidden = max(sent, plan.step_time - sent)
    assert sixteen.overlapped_seconds == pytest.approx(hidden)
    assert sixteen.efficiency == pytest.approx(one.seconds / plan.step_time)
    assert all(p.overlapped_seconds <= p.seconds for p in found.points)
    assert [p.within_node for p in found.points[:4]] == [True, True, True, False]
    assert len(planning.scaling(plan, 12).points) == 5  # 1, 2, 4, 8, 12


def test_where_it_stops_paying_by_hand():
    def point(devices, efficiency, overlapped):
        return ScalingPoint(
            devices, 1, 1.0, 1.0, 0.0, efficiency, overlapped, 0, True, True
        )

    points = [point(1, 1.0, 1.0), point(2, 0.9, 1.0), point(4, 0.6, 1.0)]
    found = Scaling("m", CLUSTER, points)
    # 2 to 4 devices: 4 * 0.6 / (2 * 0.9) = 1.33 times the throughput, below 1.5.
    assert found.stops_paying() == 2
    assert found.stops_paying(overlapped=True) is None
    assert found.sentence == (
        "With communication after computation beyond 2 devices it stops paying (60% "
        "efficiency at 4); with communication hidden behind computation every doubling "
        "up to 4 devices pays (100% efficiency at 4)."
    )
    with pytest.raises(ValueError, match="max_devices=0"):
        planning.scaling(planning.plan("moe_256"), 0)
    assert np.isfinite(found.points[0].seconds)
