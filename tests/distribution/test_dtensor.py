"""A mesh trains as one device does; what would be silently wrong says so."""

import numpy as np
import pytest

from tests.distribution import children
from tests.distribution.children import ADAM, SEVERAL_DEVICES

pytestmark = pytest.mark.slow

RATE = {"learning_rate": 0.01}
SGD = {"optimizer": "SGD", "options": {"learning_rate": 0.5}}
SEVEN = {"num_experts": 7}
SHORT = {"steps": 6}


def run(num_devices, **settings):
    return children.run("dtensor_child", {"devices": num_devices, **settings})


def audit(job, num_devices=2, **settings):
    settings = {"devices": num_devices, "job": job, **settings}
    return children.run("dtensor_audit_child", settings)


def assert_equal_on_devices(num_devices, cases):
    assert_equal(cases, run(num_devices, cases=cases))


def assert_equal(cases, results):
    for case, result in zip(cases, results, strict=True):
        assert result["start"] == 0.0, case
        # The run must have learned something, or its end says nothing.
        assert result["moved"] > 0.005, case
        assert result["losses"] <= 1e-5, (case, result)
        assert result["weights"] <= 1e-5, (case, result)
        kept = result["choices_kept"]
        assert result["choices_kept_here"] == pytest.approx(kept, abs=1e-5), case
        dropped = result["overflow"]
        assert result["overflow_here"] == pytest.approx(dropped, abs=1e-6), case
        assert ("capacity" in case) == bool(dropped and min(dropped) > 0.0), case


@pytest.mark.parametrize(
    ("num_devices", "cases"),
    [
        pytest.param(2, [SGD, {**ADAM, **SEVEN}], marks=pytest.mark.exhaustive),
        (3, [{**ADAM, **SEVEN}]),
        (4, [{**SGD, **SHORT, "mask": True, "later": True}]),
        pytest.param(4, [{**SGD, **SEVEN}, ADAM], marks=pytest.mark.exhaustive),
    ],
)
def test_mixtures_train_as_on_one_device(num_devices, cases):
    assert_equal_on_devices(num_devices, cases)


@children.cases(
    usual=[
        {**SHORT, **SGD, "layer": "hierarchical", "later": True},
        # A last batch that the devices do not divide.
        {**SHORT, **SGD, "normalized": True, "examples": 31},
    ],
    others=[
        {**SHORT, **SGD, "layer": "balanced", "mask": True, "later": True},
        {**SHORT, **SGD, "layer": "gated"},
        {**SHORT, **SGD, **SEVEN, "model": "transformer", "mask": True},
    ],
)
def test_other_layers_train_as_on_one_device(cases):
    assert_equal_on_devices(2, cases)


@children.cases(
    usual=[{**SHORT, **SGD, **SEVEN, "layer": "shared", "mask": True, "int8": True}],
    others=[
        {**SHORT, **SGD, "layer": "hierarchical by half", "mask": True},
        {**SHORT, **SGD, **SEVEN, "layer": "low rank"},  # with dropout
        {**SHORT, **SGD, "layer": "several gates"},
    ],
)
def test_todays_experts_and_gate_inputs_train_as_on_one_device(cases):
    assert_equal_on_devices(2, cases)


@children.cases(
    # By operations that DTensor expands wrongly in their stock form.
    usual=[{**SHORT, **SGD, "layer": "stock"}],
    others=[
        {**SHORT, **SGD, **SEVEN, "layer": "hash", "mask": True},
        {**SHORT, **SGD, "layer": "groups by hash"},
    ],
)
def test_gates_of_a_user_work_as_on_one_device(cases):
    assert_equal_on_devices(2, cases)


UNEVEN = {"examples": 31, "mask": True}
DEVICES = [pytest.param(1, marks=pytest.mark.exhaustive), *SEVERAL_DEVICES]


@pytest.mark.parametrize("num_devices", DEVICES)
@children.cases(
    usual=[{**SGD, **SEVEN, **UNEVEN, "capacity": 0.8}],
    others=[
        {**SGD, **SHORT, "layer": "hierarchical", "mask": True, "capacity": 0.8},
        {**SGD, **SHORT, "layer": "second by lot", "capacity": 1.0},
        # Tokens have different numbers of experts.
        {**SGD, **SHORT, **UNEVEN, "layer": "above", "capacity": 0.6},
    ],
)
def test_a_capacity_drops_what_one_device_drops(num_devices, cases):
    # Of every second batch, of 7 examples, all devices hold the whole.
    assert_equal_on_devices(num_devices, cases)


THREE = {"num_experts": 3}


@pytest.mark.parametrize("num_devices", DEVICES)
@children.cases(
    usual=[{**SGD, **UNEVEN, **THREE, "layer": "plain list", "capacity": 0.9}],
    others=[
        {**ADAM, **SHORT, "layer": "recurrent", "backwards": True},
        {**ADAM, **SHORT, **THREE, "layer": "own experts"},
        {**SGD, **SEVEN, **UNEVEN, "layer": "recurrent"},
        {**SGD, **SHORT, **SEVEN, **UNEVEN, "layer": "cell"},
        {**SGD, **SHORT, "layer": "cell", "later": True},
        {**SGD, **SHORT, "layer": "expert choice", "examples": 31},
    ],
)
def test_experts_of_any_kind_and_recurrences(num_devices, cases):
    assert_equal_on_devices(num_devices, cases)


@pytest.mark.exhaustive
def test_a_cell_both_ways_but_not_stacked():
    case = {**SGD, **SHORT, **UNEVEN, "unroll": True}
    assert_equal_on_devices(2, [{**case, "layer": "cell both ways"}])
    with pytest.raises(AssertionError, match=r"must be one cell.*RNN` of each cell"):
        run(2, cases=[{**case, "layer": "stacked cells"}])


@pytest.mark.parametrize("rows", [8, 7])
def test_operations_of_gates_are_those_of_one_device(rows):
    found = audit("operations_of_gates", rows=rows)
    assert found
    for name, (value, gradient) in found.items():
        assert value <= 1e-6, name
        assert gradient <= 1e-6, name


def optimizer_case(optimizer, options, exhaustive=True, **settings):
    marks = pytest.mark.exhaustive if exhaustive else ()
    case = {"optimizer": optimizer, "options": options, **settings}
    return pytest.param(case, marks=marks, id=optimizer)


@pytest.mark.parametrize(
    "case",
    [
        optimizer_case("AdamW", {**RATE, "use_ema": True}, **SEVEN),
        optimizer_case("LossScaleOptimizer", RATE),
        optimizer_case("Adam", {**RATE, "global_clipnorm": 0.05}),
        optimizer_case("Nadam", RATE),
        optimizer_case("Lion", {"learning_rate": 0.003}),
        optimizer_case("Ftrl", {"learning_rate": 0.1}),
        optimizer_case("RMSprop", RATE),
        optimizer_case("Adafactor", RATE, False, **SEVEN),
        optimizer_case(
            "FactoredAdam",
            {**RATE, "learning_rate_factors": {"_experts": 0.5, "_gating": 3.0}},
        ),
    ],
)
def test_optimizers_step_as_on_one_device(case):
    assert_equal_on_devices(2, [{**SHORT, **case}])


@pytest.mark.parametrize(
    ("num_devices", "cases"),
    [
        (1, [{**SHORT, **ADAM, **SEVEN}]),
        pytest.param(
            2,
            [{**SHORT, **SGD, "layer": "hierarchical"}, {**SHORT, **ADAM, **SEVEN}],
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_two_clients_train_as_one_device(num_devices, cases):
    settings = {"devices": num_devices, "cases": cases}
    results = children.run_workers(
        "dtensor_clients_child", settings, who=children.clients_of
    )
    for result in results:
        assert result["size"] == 2 * num_devices
        assert_equal(cases, result["cases"])
    # Each client has drawn other numbers at first, and holds those of the first.
    first, second = (result["sums"] for result in results)
    assert first == second
    assert first[0] > 0.0


def test_evaluation_and_prediction_take_batches_of_any_size():
    found = run(3, job="evaluates_and_predicts")
    np.testing.assert_allclose(*found["evaluate"], atol=1e-5)
    for name in ("predict", "called", "in_a_function"):
        assert found[name] <= 1e-6, name


@pytest.mark.parametrize(
    "layer", ["LSTM", pytest.param("GRU", marks=pytest.mark.exhaustive)]
)
def test_recurrent_layers_train_over_128_time_steps(layer):
    found = run(2, job="long_sequences", layer=layer, time=128)
    assert found["learned"] > 0.01
    assert found["losses"] <= 1e-6
    assert found["weights"] <= 1e-6


@pytest.mark.parametrize(
    ("first", "second", "optimizer"),
    [
        pytest.param("mirrored", "dtensor", "Adam", marks=pytest.mark.exhaustive),
        # State of other shapes than the weights'.
        ("dtensor", "mirrored", "Adafactor"),
        pytest.param("dtensor", "mirrored", "Adam", marks=pytest.mark.exhaustive),
        pytest.param("mirrored", "dtensor", "Adafactor", marks=pytest.mark.exhaustive),
    ],
)
def test_files_of_one_engine_load_under_the_other(first, second, optimizer, tmp_path):
    settings = {"folder": str(tmp_path), "optimizer": optimizer}
    run(4, job="writes_files", engine=first, **settings)
    found = run(2, job="reads_files", engine=second, **settings)
    for form, result in found.items():
        assert result["predictions"] <= 1e-6, form


def test_a_step_has_four_exchanges_and_gathers_nothing():
    found = audit("lowered_functions")
    # Two in each direction, in each branch: three numbers of slots.
    assert found["branches"] == [2] * 6
    assert "CollectiveGatherV2" not in found["collectives"]
    assert set(found["collectives"]) == {"CollectiveAllToAllV2", "CollectiveReduceV2"}
    sums = sorted(map(tuple, found["sums"]))
    for shape in found["dense"]:  # each gradient is summed over the devices
        assert tuple(shape) in sums
        sums.remove(tuple(shape))
    # The embedding's squares; importance, load and counts; loss, entropy, choices kept,
    # most slots.
    assert sums == [(), (), (), (), (8,), (8,), (8,), (20, 16)]
    for parts in found["parts"]:  # weights and both slots of Adam
        assert [part[0] for part in parts] == [4, 4]


def test_an_operation_that_fails_on_one_device_raises():
    assert audit("a_failing_operation_raises")["raised"] == "InvalidArgumentError"


@pytest.mark.parametrize(
    ("fault", "message"),
    [("switch", "set too late.*stale read"), ("asynchronous", "did not raise")],
)
def test_settings_that_cannot_be_mended_are_refused(fault, message):
    found = audit("settings_too_late", fault=fault)["message"]
    assert found is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


def test_random_numbers_do_not_depend_on_layouts():
    assert audit("random_numbers_are_those_of_one_device")["apart"] == 0.0


def test_an_export_is_that_of_one_device(tmp_path):
    found = run(2, job="exports", folder=str(tmp_path))
    assert found["apart"] <= 1e-6
    assert found["largest"] > 1e-3


def test_regularizers_constraints_and_frozen_experts_are_those_of_one_device():
    case = {"optimizer": "AdamW", "options": {**RATE, "weight_decay": 0.1}}
    assert_equal_on_devices(
        2, [{**case, "num_experts": 5, "use_bias": True, "rules": True, "steps": 5}]
    )
