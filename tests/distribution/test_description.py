"""Each device holds its part of the experts; a step exchanges rows and no more."""

import keras
import pytest

import keras_moe
from tests.distribution import children

NUM_SUMS = {"flat": 4, "hierarchical": 6}
NUM_GATHERS = {"flat": 7, "hierarchical": 8}


@pytest.fixture(scope="module")
def found():
    return children.run("description_child", {"devices": 4, "num_experts": 64})


@pytest.mark.slow
def test_each_device_holds_a_quarter_of_weights_and_slots(found):
    # Two kernels of 64 x 16 x 24 float32, of which 16 experts live on a device.
    quarter = 16 * 2 * 16 * 24 * 4
    assert found["parts"] == [[16, 16, 24], [16, 24, 16]] * 4
    assert found["part_bytes"] == [quarter] * 4
    # Adam keeps two numbers for each weight.
    assert found["slot_part_bytes"] == [2 * quarter] * 4
    described = [s for s in found["shares"] if s["layer"].endswith("experts")]
    assert [s["weight_bytes"] for s in described] == [quarter] * 4
    assert [s["slot_bytes"] for s in described] == [2 * quarter] * 4
    assert [s["entries"] for s in described] == [
        [0, 16],
        [16, 32],
        [32, 48],
        [48, 64],
    ]
    assert [s["device"] for s in described] == [f"device:CPU:{i}" for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["flat", "hierarchical"])
def test_a_step_has_the_expected_collectives_and_no_others(found, layer):
    counted = found["collectives"][layer]
    # Rows to the experts and back, and the gradients of both, on each replica.
    assert counted["CollectiveAllToAllV2"] == 4 * 4
    # What is gathered: counts of rows and tokens, never rows or weights.
    assert found["largest_gather"][layer] <= 64
    # Gradients are summed of what every replica has, and of nothing else; the other
    # sums are statistics of the 64 experts.
    assert found["gradient_sums"][layer] == [found["replicated_sizes"][layer]] * 4
    # ... and the choices that noise has left, of how many.
    assert found["largest_other_sum"][layer] == 3 * 64 + 2
    assert set(counted) <= {
        "CollectiveAllToAllV2",
        "CollectiveGatherV2",
        "CollectiveReduceV2",
    }


@pytest.mark.slow
def test_traffic_is_that_of_even_routing(found):
    # 144 tokens, k = 2, so 72 rows a replica, 3 of 4 leave it, 4 times over.
    assert found["traffic"]["moe"] == 4 * 54 * 16 * 4


@pytest.fixture(scope="module")
def in_groups():
    settings = {"devices": 4, "group_size": 2, "num_experts": 8}
    return children.run("description_child", settings)


@pytest.fixture(scope="module")
def on_two():
    return children.run("description_child", {"devices": 2, "num_experts": 8})


@pytest.mark.slow
def test_each_group_of_devices_holds_all_experts(in_groups):
    # Two kernels of 8 x 16 x 24 float32, of which 4 experts live on a device.
    half = 4 * 2 * 16 * 24 * 4
    assert in_groups["parts"] == [[4, 16, 24], [4, 24, 16]] * 4
    described = [s for s in in_groups["shares"] if s["layer"].endswith("experts")]
    assert [s["entries"] for s in described] == [[0, 4], [4, 8]] * 2
    assert [s["group"] for s in described] == [0, 0, 1, 1]
    assert [s["weight_bytes"] for s in described] == [half] * 4
    assert [s["slot_bytes"] for s in described] == [2 * half] * 4
    # 72 rows a replica, 1 of 2 leaves it, 4 times over.
    assert in_groups["traffic"]["moe"] == 4 * 36 * 16 * 4
    # The two holders of a gradient send half of it twice.
    assert in_groups["gradient_traffic"] == half
    assert "group" in in_groups["text"].splitlines()[0].split()
    assert f"{half:,} B leave a replica" in in_groups["text"]


# Of a step of a replica: what is gathered are numbers of rows and, by the optimizer,
# the rows of the embedding's gradient; what is summed are statistics, the mean of the
# loss, and gradients.
@pytest.mark.slow
@pytest.mark.parametrize("layer", ["flat", "hierarchical"])
def test_collectives_of_a_step_on_two_devices_and_in_groups(on_two, in_groups, layer):
    one, groups = on_two["members"][layer], in_groups["members"][layer]
    sums = one["CollectiveReduceV2 2"] // 2
    gathers = one["CollectiveGatherV2 2"] // 2
    assert one == {
        "CollectiveAllToAllV2 2": 4 * 2,
        "CollectiveReduceV2 2": sums * 2,
        "CollectiveGatherV2 2": gathers * 2,
    }
    # In groups, one more sum: that of all gradients of experts.
    flat = layer == "flat"
    assert groups == {
        "CollectiveAllToAllV2 2": 4 * 4,
        "CollectiveReduceV2 4": sums * 4,
        "CollectiveReduceV2 2": 4,
        # Numbers of rows are those of the group, unless rows draw noise.
        "CollectiveGatherV2 4": (gathers - flat) * 4,
        **({"CollectiveGatherV2 2": 4} if flat else {}),
    }
    assert sums == NUM_SUMS[layer]
    assert gathers == NUM_GATHERS[layer]


def test_a_model_on_one_device_has_one_replica():
    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras_moe.layers.MoE(
                keras_moe.layers.FeedForwardExperts(4, 8),
                keras_moe.layers.NoisyTopKGating(k=2),
            ),
        ]
    )
    found = keras_moe.distribution.describe(model, num_tokens=10)
    assert found.num_replicas == 1
    assert found.shares == ()
    # Two kernels of 4 x 16 x 8 and two of 16 x 4, and the seed of the noise.
    weights = 4 * (2 * 4 * 16 * 8 + 2 * 16 * 4)
    assert weights <= found.replicated_bytes <= weights + 200
    assert "On each of 1 replicas" in str(found)


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"`model` must be built"):
        keras_moe.distribution.describe(keras.Sequential([keras.layers.Dense(2)]))
