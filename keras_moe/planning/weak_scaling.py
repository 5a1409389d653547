"""Weak scaling by arithmetic: the same batch a device on more and more devices."""

import dataclasses
from typing import Any, NamedTuple

from keras_moe import checks
from keras_moe.planning.model_plan import ModelPlan
from keras_moe.planning.planner import Plan

# Parts of a step that are communication.
_COMMUNICATION = ("exchange", "vocabulary", "reduction")
# A doubling of the devices pays if throughput grows at least so many times.
_PAYS = 1.5


class ScalingPoint(NamedTuple):
    """A number of devices.

    Attributes:
        num_devices: Int.
        expert_parallel_size: Int. Devices that together have all experts.
        seconds: Float. A step in which communication and computation follow each other.
        overlapped_seconds: Float. A step in which the shorter of the two hides behind
            the other.
        communication: Float. Seconds of communication.
        efficiency: Float. Throughput over that of as many single devices, one after
            the other.
        overlapped_efficiency: Float. The same, overlapped.
        peak: Int. Bytes on the busiest device.
        fits: Bool. Whether a step fits there.
        within_node: Bool. Whether rows of experts stay within a node.
    """

    num_devices: int
    expert_parallel_size: int
    seconds: float
    overlapped_seconds: float
    communication: float
    efficiency: float
    overlapped_efficiency: float
    peak: int
    fits: bool
    within_node: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """A model on more and more devices, with the same batch a device.

    Attributes:
        name: Str. The model or preset.
        cluster: The `Cluster`.
        points: A `ScalingPoint` for each number of devices.
    """

    name: str
    cluster: Any
    points: list[ScalingPoint]

    def stops_paying(self, overlapped: bool = False) -> int | None:
        """The devices from which twice as many give less than 1.5 times the throughput.

        Args:
            overlapped: Bool. Whether communication hides behind computation. Defaults
                to `False`.

        Returns:
            Int, or None if every doubling pays.
        """
        name = "overlapped_efficiency" if overlapped else "efficiency"
        pairs = zip(self.points, self.points[1:], strict=False)
        for one, two in pairs:
            more = getattr(two, name) * two.num_devices
            more /= getattr(one, name) * one.num_devices
            if more < _PAYS ** (two.num_devices / one.num_devices / 2):
                return one.num_devices
        return None

    @property
    def sentence(self) -> str:
        """Where it stops paying, in words."""
        last = self.points[-1]
        said = []
        for overlapped in (False, True):
            how = "hidden behind" if overlapped else "after"
            stop = self.stops_paying(overlapped)
            share = last.overlapped_efficiency if overlapped else last.efficiency
            if stop is None:
                where = f"every doubling up to {last.num_devices:,} devices pays"
            else:
                where = f"beyond {stop:,} devices it stops paying"
            said.append(
                f"with communication {how} computation {where} "
                f"({share:.0%} efficiency at {last.num_devices:,})"
            )
        text = "; ".join(said) + "."
        return text[0].upper() + text[1:]


def scaling(plan: Plan | ModelPlan, max_devices: int = 2048) -> Scaling:
    """Simulates weak scaling of a plan: 1, 2, 4, ... devices of its cluster.

    The batch of a device stays that of the plan, so the global batch grows. Of a model
    every number of devices has the size of expert-parallel groups that is the fastest
    there; of a preset all devices share its experts.

    Args:
        plan: From `plan`.
        max_devices: Int. Defaults to `2048`.

    Returns:
        A `Scaling`.

    Raises:
        ValueError: `max_devices` is below 1.

    Example:

    >>> found = keras_moe.planning.scaling(keras_moe.planning.plan("moe_256", "h100"))
    >>> [point.num_devices for point in found.points][-2:]
    [1024, 2048]
    """
    max_devices = checks.verify_positive_int(max_devices, "max_devices")
    numbers = [1 << i for i in range(max_devices.bit_length())]
    if numbers[-1] != max_devices:
        numbers.append(max_devices)
    found: list[ScalingPoint] = []
    alone = None
    for number in numbers:
        there = plan.resized(number)
        sent = sum(there.seconds.get(part, 0.0) for part in _COMMUNICATION)
        computing = there.step_time - sent
        overlapped = max(sent, computing)
        alone = computing if alone is None else alone
        size = getattr(there, "expert_parallel_size", number)
        found.append(
            ScalingPoint(
                number,
                size,
                there.step_time,
                overlapped,
                sent,
                alone / there.step_time,
                alone / overlapped,
                there.memory.peak,
                there.fits,
                size <= there.cluster.devices_per_node,
            )
        )
    name = getattr(plan, "name", None)
    return Scaling(str(name), plan.cluster, found)
