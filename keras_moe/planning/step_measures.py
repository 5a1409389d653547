"""What a training step of a model takes on one device, in numbers."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from keras_moe.distribution.topology import make_shards


class Stored(NamedTuple):
    """A variable.

    Attributes:
        path: Str.
        size: Int. Bytes.
        entries: `(experts, experts that stay together)` where devices share it, else
            None.
        trained: Bool.
    """

    path: str
    size: int
    entries: tuple[int, int] | None
    trained: bool


class Mixture(NamedTuple):
    """A mixture, as far as it matters what it sends.

    Attributes:
        name: Str.
        num_experts: Int.
        group_size: Int. Experts that stay on one device.
        rows: Int. Rows that a device's tokens send to experts.
        features: Float. Numbers in a row, the mean of there and back.
        itemsize: Int. Bytes of a number.
        is_sharded: Bool. Whether devices share its experts.
        recompute: Bool. Whether hidden activations are computed again.
    """

    name: str
    num_experts: int
    group_size: int
    rows: int
    features: float
    itemsize: int
    is_sharded: bool
    recompute: bool


@dataclasses.dataclass(frozen=True, eq=False)
class StepMeasures:
    """A training step on one device that has all experts.

    Attributes:
        weights: The variables of the model.
        slots: Those of the optimizer.
        input_bytes: Int. Bytes of the batch.
        mixtures: Its mixtures that were called once, with what they send.
        activations: Int. Bytes that the forward pass makes and the backward pass
            reads.
        expert_activations: Int. Those of them that are rows of experts.
        peak: Function of the devices that together have all experts, of the number of
            devices, and of the rows of experts on the busiest of them over the mean;
            returns the most bytes that a step takes at once beside variables and batch,
            where most are.
        work: Dict of `expert_multiply_adds`, `dense_multiply_adds`, `moved_bytes` (what
            operations other than products read and write) and `operations`, of a whole
            step.
        assumed: Types of operations whose sizes depend on data and were assumed.
    """

    weights: list[Stored]
    slots: list[Stored]
    input_bytes: int
    mixtures: list[Mixture]
    activations: int
    expert_activations: int
    peak: Callable[[int, int, float], int]
    work: dict[str, int]
    assumed: list[str]

    @property
    def num_experts(self) -> int:
        """Experts of the mixture that has most; 0 without one that devices share."""
        return max((m.num_experts for m in self.mixtures if m.is_sharded), default=0)


def share_of(devices: int) -> Callable[[int, int], float]:
    """Which part of a stacked weight the device with most experts has.

    Args:
        devices: Devices that together have all experts.

    Returns:
        A function of the experts and of how many of them stay together.
    """

    def share(num_experts: int, group_size: int) -> float:
        return (
            int(make_shards(num_experts, devices, group_size).sizes.max()) / num_experts
        )

    return share


def held(stored: list[Stored], devices: int = 1) -> int:
    """Bytes of variables on the device that has most.

    Args:
        stored: Variables.
        devices: Devices that together have all experts. Defaults to `1`.

    Returns:
        Int.
    """
    share = share_of(devices)
    return round(sum(s.size * (share(*s.entries) if s.entries else 1) for s in stored))
