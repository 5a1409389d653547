"""A plan of a model of the user's own: memory, traffic and time of a device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from keras_moe.distribution.topology import make_shards
from keras_moe.planning import model_advice
from keras_moe.planning.cluster import Cluster
from keras_moe.planning.figures import Figures
from keras_moe.planning.step_measures import StepMeasures, held

# Times that a step reads or writes an expert's weight and its gradient.
_WEIGHT_PASSES = 6


@dataclasses.dataclass(frozen=True)
class ModelMemory:
    """Bytes on the device that has most.

    Attributes:
        weights: Int. All variables of the model.
        slots: Int. Those of the optimizer.
        inputs: Int. The batch of a device.
        gradients: Int. Of the trained variables, all at once.
        activations: Int. What the forward pass makes and the backward pass reads.
        step: Int. The most that a step holds at once beside variables and batch:
            activations, those gradients that are there with them, rows on their way, and
            what operations, sums over devices and updates take.
        routing: Int. What uneven routing adds.
    """

    weights: int
    slots: int
    inputs: int
    gradients: int
    activations: int
    step: int
    routing: int

    @property
    def variables_and_slots(self) -> int:
        """What stays from step to step."""
        return self.weights + self.slots

    @property
    def parameters(self) -> int:
        """Weights, slots and gradients: what more examples do not change."""
        return self.variables_and_slots + self.gradients

    @property
    def peak(self) -> int:
        """The most that a device holds at once."""
        return self.variables_and_slots + self.inputs + self.step + self.routing


class Group(NamedTuple):
    """What it means that so many devices together have all experts.

    Attributes:
        size: Int. Devices of a group, which all experts are shared among.
        memory: `ModelMemory`.
        exchange_bytes: Int. Rows that leave a device in a step, of all mixtures.
        reduction_bytes: Int. Gradients that are summed over devices.
        seconds: Dict of part to seconds of a step, one after the other.
        fits: Bool. Whether a step fits in the memory of a device.
    """

    size: int
    memory: ModelMemory
    exchange_bytes: int
    reduction_bytes: int
    seconds: dict[str, float]
    fits: bool

    @property
    def step_time(self) -> float:
        """Seconds of a step in which nothing overlaps."""
        return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True, eq=False)
class ModelPlan(Figures):
    """A model on a cluster. Figures are those of the busiest device.

    Attributes:
        name: Str.
        cluster: The `Cluster`.
        num_devices: Int. Every one of them has the whole model but for experts.
        batch_size: Int. Examples of one device.
        optimizer: Str. Name of the optimizer's class.
        imbalance: Float. Rows of the busiest device over the mean.
        measures: `StepMeasures` of a device's batch, as a device of the size of groups
            that is planned computes it.
        groups: The possible sizes of groups that share the experts.
        expert_parallel_size: Int. The size planned: as was said, or the fastest that
            fits.
        remeasure: Function of a batch size, a size of groups, and `recompute` (Bool or
            None: as planned); returns the `StepMeasures` of such a step.
    """

    name: str
    cluster: Cluster
    num_devices: int
    batch_size: int
    optimizer: str
    imbalance: float
    measures: StepMeasures
    groups: dict[int, Group]
    expert_parallel_size: int
    remeasure: Callable[[int, int, bool | None], StepMeasures]

    @property
    def group(self) -> Group:
        """Figures of the size planned."""
        return self.groups[self.expert_parallel_size]

    @property
    def memory(self) -> ModelMemory:
        """Memory of the busiest device."""
        return self.group.memory

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of a step, by what takes them."""
        return self.group.seconds

    @property
    def tflops(self) -> float:
        """Products of a device, 10^12 operations a second, a multiply-add being two."""
        work = self.measures.work
        products = work["dense_multiply_adds"] + work["expert_multiply_adds"]
        return 2 * products / self.step_time / 1e12

    @functools.cached_property
    def min_devices(self) -> int:
        """The least devices on which weights, slots and gradients fit, or 0."""
        devices = 1
        while devices <= 2 * max(1, self.measures.num_experts):
            found = memory_of_group(self.measures, devices, devices, self.imbalance)
            if found.parameters <= self.usable_memory:
                return devices
            devices *= 2
        return 0

    @functools.cached_property
    def most_batch_size(self) -> int:
        """Examples of one device for which a step fits, about; 0 if there are none.

        From the peaks of this batch and of half of it, in a straight line.
        """
        if self.batch_size == 1:
            return int(self.fits)
        half = self.batch_size // 2
        less = self._memory_of(half, None).peak
        each = max(1.0, (self.memory.peak - less) / (self.batch_size - half))
        room = self.usable_memory - self.memory.peak
        return max(0, int(self.batch_size + room / each))

    @functools.cached_property
    def other_memory(self) -> ModelMemory:
        """Memory with `recompute` of all experts the other way."""
        now = any(m.recompute for m in self.measures.mixtures)
        return self._memory_of(self.batch_size, not now)

    def _memory_of(self, batch_size, recompute):
        """Memory of another step."""
        size, devices = self.expert_parallel_size, self.num_devices
        measures = self.remeasure(batch_size, size, recompute)
        return memory_of_group(measures, size, devices, self.imbalance)

    @property
    def advice(self) -> list[str]:
        """Plain sentences: the verdict, then what to change."""
        return model_advice.advise(self)

    def resized(self, num_devices: int) -> "ModelPlan":
        """The same batch a device on another number of devices.

        Args:
            num_devices: Int.

        Returns:
            A `ModelPlan`, with the size of groups that is the fastest there.
        """
        return make_plan(
            name=self.name,
            cluster=self.cluster,
            num_devices=num_devices,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            imbalance=self.imbalance,
            expert_parallel_size=None,
            remeasure=self.remeasure,
        )


def make_plan(
    *,
    expert_parallel_size: int | None,
    remeasure: Callable[[int, int, bool | None], StepMeasures],
    **known: Any,
) -> ModelPlan:
    """Plans every size of groups and picks one.

    Args:
        expert_parallel_size: Int or None. None picks the fastest that fits, or the one
            of least memory if none does.
        remeasure: As `ModelPlan` has it.
        **known: The other attributes of `ModelPlan`.

    Returns:
        The `ModelPlan`.

    Raises:
        ValueError: The size does not divide the number of devices.
    """
    devices, cluster = known["num_devices"], known["cluster"]
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    if expert_parallel_size is not None and expert_parallel_size not in sizes:
        raise ValueError(
            "`expert_parallel_size` must divide the number of devices. Received: "
            f"expert_parallel_size={expert_parallel_size}, num_devices={devices}. "
            f"Take one of {sizes[:12]}, or None for the best."
        )
    # Beyond one expert a device a larger group holds nothing less.
    batch_size = known["batch_size"]
    most = max(1, remeasure(batch_size, 1, None).num_experts)
    tried = [n for n in sizes if n < 2 * most or n == expert_parallel_size]
    measures = {size: remeasure(batch_size, size, None) for size in tried}
    groups = {
        size: _group(measures[size], size, devices, cluster, known["imbalance"])
        for size in tried
    }
    if expert_parallel_size is None:
        fitting = [n for n in tried if groups[n].fits]
        expert_parallel_size = (
            min(fitting, key=lambda n: groups[n].step_time)
            if fitting
            else min(tried, key=lambda n: groups[n].memory.peak)
        )
    return ModelPlan(
        measures=measures[expert_parallel_size],
        remeasure=remeasure,
        groups=groups,
        expert_parallel_size=expert_parallel_size,
        **known,
    )


def memory_of_group(
    measures: StepMeasures, size: int, devices: int, imbalance: float
) -> ModelMemory:
    """Memory of the busiest device.

    Args:
        measures: `StepMeasures`.
        size: Int. Devices that together have all experts.
        devices: Int. All of them.
        imbalance: Float. Rows of the busiest device over the mean.

    Returns:
        The `ModelMemory`.
    """
    over_mean = _rows_over_mean(measures, size, imbalance)
    more = (over_mean - 1) * measures.expert_activations
    trained = [stored for stored in measures.weights if stored.trained]
    return ModelMemory(
        weights=held(measures.weights, size),
        slots=held(measures.slots, size),
        inputs=measures.input_bytes,
        gradients=held(trained, size),
        activations=measures.activations,
        step=measures.peak(size, devices, over_mean),
        routing=round(max(0.0, more)),
    )


def _rows_over_mean(measures, size, imbalance):
    """Rows of experts on the busiest device of a group over the mean."""
    if size == 1 or not measures.num_experts:
        return 1.0
    share = max(
        make_shards(m.num_experts, size, m.group_size).sizes.max() / m.num_experts
        for m in measures.mixtures
        if m.is_sharded
    )
    return imbalance * float(share) * size


def _group(measures, size, devices, cluster, imbalance):
    memory = memory_of_group(measures, size, devices, imbalance)
    over_mean = _rows_over_mean(measures, size, imbalance)
    work = measures.work
    away = (size - 1) / size
    sharded = [m for m in measures.mixtures if m.is_sharded]
    sent = [4 * m.rows * m.features * m.itemsize * away for m in sharded]
    trained = [s for s in measures.weights if s.trained]
    copies = [s for s in trained if s.entries is None]
    experts = [s for s in trained if s.entries is not None]
    rates = cluster.flops, cluster.memory_gb_per_second * 1e9
    seconds = {
        "dense": 2 * work["dense_multiply_adds"] / rates[0],
        "experts": 2 * work["expert_multiply_adds"] * over_mean / rates[0],
        "weights": _WEIGHT_PASSES * held(experts, size) / rates[1],
        "elementwise": work["moved_bytes"] / rates[1],
        "launches": work["operations"] * cluster.launch_microseconds * 1e-6,
        # Four exchanges of each mixture: there and back, and the gradients.
        "exchange": sum(
            4 * cluster.exchange_seconds(each * over_mean / 4, size) for each in sent
        ),
        "reduction": cluster.reduction_seconds(held(copies), devices)
        + cluster.far_reduction_seconds(held(experts, size), devices, size),
    }
    ratio = 2 * (devices - 1) / devices
    between = devices // size
    reduced = ratio * held(copies) + 2 * (between - 1) / between * held(experts, size)
    fits = memory.peak <= cluster.usable_memory
    return Group(size, memory, round(sum(sent)), round(reduced), seconds, fits)
