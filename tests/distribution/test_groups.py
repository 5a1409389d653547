"""Data x expert parallelism: groups of devices that hold all experts each."""

import pytest

from tests.distribution import children
from tests.distribution.test_equivalence import (
    ADAM,
    CLIPPED_ADAM,
    HIERARCHICAL,
    RATE,
    SEVEN,
    SGD,
    SHORT,
    UNEVEN,
    assert_equal,
)

pytestmark = pytest.mark.slow

DROPOUT = {"dropout": 0.3}
ACCUMULATED = {**ADAM, "options": {**ADAM["options"], "gradient_accumulation_steps": 2}}
CLIPPED_SGD = {**SGD, "options": {"learning_rate": 0.5, "clipnorm": 0.05}}
LOSS_SCALED = {**ADAM, "optimizer": "LossScaleOptimizer"}
AVERAGED = {"weight_decay": 0.1, "use_ema": True, "ema_overwrite_frequency": 3}
AVERAGED = {"optimizer": "AdamW", "options": {**RATE, **AVERAGED}}
FACTORED = {"optimizer": "FactoredAdam", "options": {**RATE, "global_clipnorm": 0.05}}
ADAFACTOR = {"optimizer": "Adafactor", "options": RATE}


exhaustive = pytest.mark.exhaustive


def assert_equal_in_groups(num_devices, group_size, cases):
    settings = {"devices": num_devices, "group_size": group_size, "cases": cases}
    assert_equal(cases, children.run("child", settings, timeout=900))


# 4 devices in groups of 2, or each with all experts. In every second batch, of one
# example, all devices but one have no row, and a group has none.
@pytest.mark.parametrize("group_size", [2, pytest.param(1, marks=exhaustive)])
@children.cases(
    usual=[
        {**ACCUMULATED, **UNEVEN, **HIERARCHICAL, **DROPOUT, "later": True}
        | {"steps": 20}
    ],
    others=[{**CLIPPED_ADAM, **SEVEN, **UNEVEN, **DROPOUT, "steps": 20}],
)
def test_groups_train_as_one_device(group_size, cases):
    assert_equal_in_groups(4, group_size, cases)


@children.cases(
    usual=[{**CLIPPED_ADAM, **SEVEN, **UNEVEN}],
    others=[{**CLIPPED_SGD, **UNEVEN, **HIERARCHICAL, "capacity": 0.8}],
)
def test_every_device_may_hold_all_experts(cases):
    assert_equal_in_groups(2, 1, cases)


@pytest.mark.parametrize("group_size", [2, pytest.param(1, marks=exhaustive)])
@children.cases(
    usual=[
        {**CLIPPED_SGD, **SEVEN, **UNEVEN, **SHORT, **HIERARCHICAL} | {"capacity": 0.8},
    ],
    others=[{**SGD, **SEVEN, **UNEVEN, **SHORT, "capacity": 0.8}],
)
def test_a_capacity_drops_what_one_device_drops(group_size, cases):
    assert_equal_in_groups(4, group_size, cases)


@children.cases(
    usual=[{**SGD, **UNEVEN, **SHORT, "layer": "list", "num_experts": 5}],
    others=[{**CLIPPED_ADAM, **SHORT, **UNEVEN, "layer": "groups of a list"}],
)
def test_experts_that_are_layers_are_shared_out_among_all(cases):
    assert_equal_in_groups(4, 2, cases)


@exhaustive
@pytest.mark.parametrize("group_size", [1, 2])
def test_other_mixtures(group_size):
    short = {**SGD, **UNEVEN, **SHORT}
    assert_equal_in_groups(
        4,
        group_size,
        [
            {**short, **SEVEN, "layer": "own experts"},
            {**short, "num_experts": 3, "layer": "list", "nested": True},
            {**short, **SEVEN, "layer": "recurrent"},
            {**short, **SEVEN, "layer": "several gates"},
            {**short, "layer": "groups by hash"},
            {**short, "layer": "loss-free"},
            {**short, "layer": "expert choice"},
            {**short, "layer": "low rank", "num_experts": 5},
            {**short, "layer": "above", "capacity": 0.6},
            {**short, "layer": "balanced"},
        ],
    )


@children.cases(
    usual=[
        {**AVERAGED, "num_experts": 5, "use_bias": True, "rules": True} | {"steps": 8}
    ],
    others=[{**FACTORED, **SEVEN, "use_bias": True, "steps": 5}],
)
def test_rules_of_experts_count_once(cases):
    assert_equal_in_groups(4, 2, cases)


@exhaustive
@pytest.mark.parametrize("group_size", [1, 2])
def test_other_optimizers(group_size):
    cases = [{**ADAFACTOR, **SEVEN}, LOSS_SCALED, {**FACTORED, "use_bias": True}]
    cases.append({**AVERAGED, "num_experts": 5, "use_bias": True, "rules": True})
    assert_equal_in_groups(4, group_size, [{**case, "steps": 6} for case in cases])


@exhaustive
def test_more_devices_in_a_group_than_experts():
    case = {**ADAM, **UNEVEN, "num_experts": 1}
    assert_equal_in_groups(4, 2, [{**case, "layer": "hash"}, {**case, **HIERARCHICAL}])


def assert_equal_in_processes(num_workers, devices, group_size, cases):
    settings = {"devices": devices, "group_size": group_size, "cases": cases}
    for results in children.run_workers("child", settings, num_workers, timeout=900):
        assert_equal(cases, results)


# Groups within a process, or all experts on each device. `tf.data` does not say which
# device of a process gets which part of a batch: no noise, which goes by that.
@pytest.mark.parametrize("group_size", [2, pytest.param(1, marks=exhaustive)])
def test_two_processes_of_two_devices(group_size):
    case = {**CLIPPED_ADAM, **SHORT, "layer": "loss-free", "num_experts": 6}
    assert_equal_in_processes(2, 2, group_size, [case])


@exhaustive
def test_groups_that_lie_in_two_processes():
    # These read a whole variable together.
    cases = [{**CLIPPED_ADAM, **SEVEN, **SHORT}, {**SGD, **HIERARCHICAL, **SHORT}]
    assert_equal_in_processes(4, 1, 2, cases)
