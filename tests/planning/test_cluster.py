"""Clusters from the package, and from files."""

import json

import pytest

from keras_moe import planning
from keras_moe.planning import load_cluster

VALUES = {
    "name": "mine",
    "device": "card",
    "num_devices": 8,
    "memory_gb": 24,
    "teraflops": 30,
    "efficiency": 0.5,
    "memory_gb_per_second": 900,
    "network_gb_per_second": 10,
}


def write(tmp_path, **changes):
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps({**VALUES, **changes}))
    return path


def test_those_of_the_package():
    assert planning.cluster_names() == ["h100", "k40"]
    assert load_cluster("k40").num_devices is None
    assert load_cluster("h100").num_devices >= 1000
    for name in planning.cluster_names():
        assert load_cluster(name).sources  # says where its figures come from


def test_a_file_of_ones_own(tmp_path):
    cluster = load_cluster(write(tmp_path))
    assert cluster.node_gb_per_second == 10
    assert cluster.memory == 24e9
    assert cluster.flops == 15e12
    # 7.5e12 multiply-adds while 2.5e9 numbers go.
    assert cluster.ratio() == 3000
    assert planning.plan("moe_256", write(tmp_path)).num_devices == 8


def test_near_and_far_devices(tmp_path):
    cluster = load_cluster(
        write(
            tmp_path,
            devices_per_node=3,
            node_gb_per_second=100,
            message_microseconds=1000,
        )
    )
    # Of 4 others 2 are near: half of 8e9 bytes at 100, half at 10 GB/s; 4 messages.
    assert cluster.exchange_seconds(8e9, 5) == pytest.approx(0.04 + 0.4 + 0.004)
    assert cluster.exchange_seconds(8e9, 1) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_gb": 0}, "memory_gb=0 in 'mine'"),
        ({"teraflops": "many"}, "teraflops='many'"),
        ({"efficiency": 1.5}, "efficiency=1.5"),
        ({"num_devices": 0}, "num_devices=0"),
        ({"colour": 1}, r"with \['colour'\]"),
    ],
)
def test_bad_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_cluster(write(tmp_path, **changes))


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="cluster='k41'.*no file"):
        load_cluster("k41")
    path = tmp_path / "bad.json"
    path.write_text("memory: 3")
    with pytest.raises(ValueError, match="file of JSON"):
        load_cluster(path)
