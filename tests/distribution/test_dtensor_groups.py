"""A mesh in groups of devices, each with all experts, trains as one device does."""

import pytest

import keras_moe
from tests.distribution import children
from tests.distribution.test_dtensor import (
    ADAM,
    RATE,
    SEVEN,
    SGD,
    SHORT,
    UNEVEN,
    assert_equal,
    audit,
)

RULES = {"optimizer": "AdamW", "options": {**RATE, "weight_decay": 0.1}, "rules": True}
CLIPPED = {"optimizer": "Adam", "options": {**RATE, "global_clipnorm": 0.05}}
exhaustive = pytest.mark.exhaustive


def run(size, num_devices=4, **settings):
    settings = {"devices": num_devices, "expert_parallel_size": size, **settings}
    return children.run("dtensor_child", settings)


def optimizer_case(optimizer, **options):
    case = {**SHORT, **SEVEN, "optimizer": optimizer, "options": {**RATE, **options}}
    return pytest.param(2, [case], marks=exhaustive, id=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "cases"),
    [
        # Of every second batch, of 7 examples, all devices hold the whole.
        (2, [{**SGD, **SEVEN, **UNEVEN, "capacity": 0.8}]),
        (
            2,
            [
                {
                    **SGD,
                    **SHORT,
                    "layer": "hierarchical",
                    "mask": True,
                    "capacity": 0.8,
                }
            ],
        ),
        pytest.param(
            1,
            [{**SGD, **SEVEN, "later": True}],
            marks=exhaustive,
        ),
        pytest.param(
            2,
            [
                {**ADAM, "dropout": 0.3},
                # Each copy of an expert counts once in losses and norms.
                {**RULES, "num_experts": 5, "use_bias": True, "steps": 5},
            ],
            marks=exhaustive,
        ),
        pytest.param(
            2,
            [
                {**CLIPPED, **SHORT, **SEVEN},
                {**SGD, **SHORT, **SEVEN, "layer": "low rank"},
            ],
            marks=exhaustive,
        ),
        pytest.param(
            2,
            [
                {
                    **SGD,
                    **SHORT,
                    **SEVEN,
                    "layer": "shared",
                    "mask": True,
                    "int8": True,
                },
                {**SGD, **SHORT, "layer": "balanced", "mask": True, "later": True},
                {**SGD, **SHORT, **SEVEN, "model": "transformer", "mask": True},
                {**ADAM, **SHORT, "layer": "several gates", "examples": 31},
            ],
            marks=exhaustive,
        ),
        pytest.param(
            2,
            [
                {**SGD, **UNEVEN, "num_experts": 3, "layer": "plain list"},
                {**SGD, **SHORT, **SEVEN, **UNEVEN, "layer": "recurrent"},
            ],
            marks=exhaustive,
        ),
        optimizer_case("Adam", clipnorm=0.02),
        optimizer_case("AdamW", use_ema=True),
        optimizer_case("Adafactor"),
        optimizer_case("FactoredAdam"),
        optimizer_case("LossScaleOptimizer"),
    ],
)
def test_groups_train_as_one_device(size, cases):
    assert_equal(cases, run(size, cases=cases))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "branches"), [(2, [2] * 6), pytest.param(1, [], marks=exhaustive)]
)
def test_tokens_stay_in_their_group_and_copies_are_summed(size, branches):
    found = audit("lowered_functions", 4, expert_parallel_size=size)
    # Two exchanges in each direction, in each of three branches, none among more devices.
    assert found["branches"] == branches
    assert found["group_sizes"] == sorted({size} - {1})
    assert set(found["collectives"]) <= {"CollectiveAllToAllV2", "CollectiveReduceV2"}
    # One sum of a kernel's gradients, among the devices that hold the same experts.
    assert found["sums_of_copies"] == [4 // size] * 2
    parts = [[8 // size, 16, 24], [8 // size, 24, 16]]
    sums = sorted(map(tuple, found["sums"]))
    for shape in (*found["dense"], *parts):
        sums.remove(tuple(shape))
    # As on a mesh without groups.
    assert sums == [(), (), (), (), (8,), (8,), (8,), (20, 16)]
    assert found["copies_apart"] == 0.0
    # A device holds 1 / P of the experts, and of both slots of Adam.
    for held in found["parts"]:
        assert held in ([parts[0]] * 4, [parts[1]] * 4)
    whole = 8 * 2 * 16 * 24 * 4
    expected = {"weight": whole // size, "optimizer": 2 * whole // size}
    assert found["expert_bytes"] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "optimizer"),
    [
        ((4, 2, "dtensor"), (1, None, "one device"), "Adam"),
        pytest.param(
            (1, None, "one device"), (4, 2, "dtensor"), "Adafactor", marks=exhaustive
        ),
        pytest.param((4, 1, "dtensor"), (3, None, "dtensor"), "Adam", marks=exhaustive),
        pytest.param(
            (2, None, "mirrored"), (4, 2, "dtensor"), "Adam", marks=exhaustive
        ),
    ],
)
def test_files_do_not_know_the_groups(first, second, optimizer, tmp_path):
    for job, (devices, size, engine) in (("writes", first), ("reads", second)):
        settings = {"engine": engine, "folder": str(tmp_path), "optimizer": optimizer}
        found = run(size, devices, job=f"{job}_files", **settings)
    for form, result in found.items():
        assert result["predictions"] <= 1e-6, form
        assert result.get("losses", 0.0) <= 1e-5, form


@pytest.mark.slow
def test_evaluation_prediction_and_export(tmp_path):
    found = run(2, job="evaluates_and_predicts")
    assert found["evaluate"][0] == pytest.approx(found["evaluate"][1], abs=1e-5)
    for name in ("predict", "called", "in_a_function"):
        assert found[name] <= 1e-6, name
    assert run(2, job="exports", folder=str(tmp_path))["apart"] <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(None, marks=exhaustive)])
def test_a_mesh_whose_exchange_goes_astray_is_refused(size):
    message = audit("devices_out_of_order", 4, expert_parallel_size=size)["message"]
    assert message is not None
    with pytest.raises(ValueError, match=r"wrong devices in a trial.*Sort `devices`"):
        raise ValueError(message)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (2, r"divide the number of devices.*expert_parallel_size=2, 1 devices"),
        (0, r"`expert_parallel_size`.*0"),
        (1.5, r"`expert_parallel_size`.*1\.5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        keras_moe.distribution.create_mesh(
            1, device_type="CPU", expert_parallel_size=size
        )
