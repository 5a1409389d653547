"""What follows from memory and seconds, whatever was planned."""

from typing import Any


class Figures:
    """Of a plan with `cluster`, `memory` of the busiest device and `seconds` of a step."""

    @property
    def usable_memory(self: Any) -> float:
        """Bytes of a device without what is left to the runtime."""
        return self.cluster.usable_memory

    @property
    def parameters_fit(self: Any) -> bool:
        """Whether weights, slots and gradients fit."""
        return self.memory.parameters <= self.usable_memory

    @property
    def fits(self: Any) -> bool:
        """Whether a step fits, with the activations of its batch."""
        return self.memory.peak <= self.usable_memory

    @property
    def step_time(self: Any) -> float:
        """Seconds of a step in which nothing overlaps."""
        return sum(self.seconds.values())

    @property
    def bound(self: Any) -> str:
        """The part of a step that takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])
