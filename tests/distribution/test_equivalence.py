"""Training on several devices is training on one: losses, weights, state."""

import pytest

from tests.distribution import children

pytestmark = pytest.mark.slow

SGD = {"optimizer": "SGD", "options": {"learning_rate": 0.5}}
ADAM = {"optimizer": "Adam", "options": {"learning_rate": 0.01}}


def assert_equal(num_devices, cases):
    results = children.run("child", {"devices": num_devices, "cases": cases})
    for case, result in zip(cases, results, strict=True):
        assert result["start"] == 0.0, case
        # The run must have learned something, or its end says nothing.
        assert result["moved"] > 0.01, case
        assert result["losses"] <= 1e-5, (case, result)
        assert result["weights"] <= 1e-5, (case, result)


@pytest.mark.parametrize("num_devices", [2, 3, 4])
def test_flat_mixture_trains_as_on_one_device(num_devices):
    assert_equal(num_devices, [SGD, {**ADAM, "num_experts": 7}])


def test_factored_state_is_sharded_as_the_experts_are():
    # All rank-2 weights factored too: their state is the same on every device.
    everything = {"optimizer": "FactoredAdam", "options": {"factored": ["kernel"]}}
    clipped = {"learning_rate": 0.01, "global_clipnorm": 0.05}
    assert_equal(
        2,
        [
            {"optimizer": "FactoredAdam", "options": clipped, "use_bias": True},
            {**everything, "num_experts": 7, "steps": 15},
        ],
    )


def test_more_devices_than_experts():
    assert_equal(3, [{**ADAM, "num_experts": 2}])
