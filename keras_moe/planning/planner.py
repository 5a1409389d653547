"""What fits where, what it costs, and what bounds it."""

import dataclasses
from pathlib import Path
from typing import Any

from keras_moe import checks
from keras_moe.models.counting import count
from keras_moe.models.presets import Preset, as_preset
from keras_moe.planning.advice import advise
from keras_moe.planning.cluster import Cluster, load_cluster
from keras_moe.planning.figures import Figures
from keras_moe.planning.memory import Memory, memory_of
from keras_moe.planning.model_plan import ModelPlan
from keras_moe.planning.placing import Placement, place
from keras_moe.planning.traffic import (
    Work,
    softmax_operations,
    step_seconds,
    work_of,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(Figures):
    """A model on a cluster. Figures are those of the busiest device.

    Attributes:
        preset: The `Preset`, with what was changed for the plan.
        cluster: The `Cluster`.
        batch_tokens: Int. Tokens of the global batch.
        imbalance: Float. Rows of the busiest device over the mean.
        placement: `Placement` of experts, groups and vocabulary.
        memory: `Memory`, with and without `recompute` as the preset says.
        other_memory: `Memory` with `recompute` the other way.
        work: `Work` of a step.
        seconds: Dict of part to seconds of a step; nothing overlaps.
        min_devices: Int. The least power of two of devices on which weights,
            slots and gradients fit: a smaller batch needs less of everything else.
    """

    preset: Preset
    cluster: Cluster
    batch_tokens: int
    imbalance: float
    placement: Placement
    memory: Memory
    other_memory: Memory
    work: Work
    seconds: dict[str, float]
    min_devices: int

    @property
    def name(self) -> str:
        """Name of the preset."""
        return self.preset.name

    def resized(self, num_devices: int) -> "Plan":
        """The same batch a device on another number of devices.

        Args:
            num_devices: Int.

        Returns:
            A `Plan`.
        """
        tokens = max(1, self.batch_tokens // self.num_devices) * num_devices
        return _plan_preset(
            self.preset,
            self.cluster,
            num_devices=num_devices,
            batch_tokens=tokens,
            shard_vocabulary=self.placement.vocabulary_sharded,
            imbalance=self.imbalance,
        )

    @property
    def num_devices(self) -> int:
        """Devices, R."""
        return self.placement.num_devices

    @property
    def most_tokens(self) -> int:
        """Tokens of a device for which a step fits; 0 if there are none."""
        least, most = 0, self.batch_tokens

        def fits(tokens):
            over_mean = self.placement.rows_over_mean(self.imbalance)
            memory = memory_of(self.preset, self.placement, tokens, over_mean)
            return memory.peak <= self.usable_memory

        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if fits(middle) else (least, middle - 1)
        return least

    @property
    def tflops(self) -> float:
        """Rate of a device as the paper counts it, in 10^12 operations a second.

        Operations forward and backward with those of the sampled softmax, a
        multiply-add being two; recomputed ones do not count.
        """
        operations = count(self.preset).core_operations + softmax_operations(
            self.preset
        )
        each = 6 * operations * self.batch_tokens / self.num_devices
        return each / self.step_time / 1e12

    @property
    def device_ratio(self) -> float:
        """Multiply-adds of a device for each number it sends."""
        return self.cluster.ratio()

    @property
    def advice(self) -> list[str]:
        """Plain sentences: the verdict, then what to change."""
        return advise(self)


def plan(
    model: Any,
    cluster: Cluster | str | Path = "k40",
    *,
    num_devices: int | None = None,
    batch_tokens: int | None = None,
    recompute: bool | None = None,
    expert_optimizer: str | None = None,
    shard_vocabulary: bool = False,
    imbalance: float = 1.15,
    batch: Any = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    optimizer: Any = None,
    expert_parallel_size: int | None = None,
) -> Plan | ModelPlan:
    """Plans a model of yours, or a preset of the paper, on a cluster.

    A preset is planned by arithmetic: nothing is allocated, so every size can be
    planned. Experts are placed by `keras_moe.distribution.topology`, as training places
    them.

    Of a built Keras model the graph of a training step is made, and not run: which
    buffers are there at the same time, which products are computed and how many rows
    travel follow from its operations. Every device has the whole model but for the
    experts, which groups of `expert_parallel_size` devices share.

    Args:
        model: A built `keras.Model`, compiled or not, with or without experts; or a
            `Preset`, or the name of one.
        cluster: A `Cluster`, the name of one, or the path of a JSON file with its
            attributes. Defaults to `"k40"`, the paper's.
        num_devices: Int or None. None means those of the cluster, or of the preset
            where the cluster names none, and 1 for a model. Defaults to `None`.
        batch_tokens: Int or None. Of a preset: tokens of the global batch; None means
            the preset's. Defaults to `None`.
        recompute: Bool or None. Whether the experts' hidden activations are
            computed twice; None means as the preset or the model. Defaults to `None`.
        expert_optimizer: Of a preset: `"adam"`, `"factored_adam"` or None: the
            preset's. Defaults to `None`.
        shard_vocabulary: Bool. Of a preset: whether embedding and softmax are shared
            among the devices, as `distribution.shard_vocabulary` does it; the traffic
            is that of rows from their owners alone. Defaults to `False`.
        imbalance: Float, 1 or more. Load of the busiest device over the mean.
            Defaults to `1.15`, the paper's measured max/mean (table 6).
        batch: Of a model: `(x, y)` or `x`, arrays or `tf.TensorSpec`, the batch of one
            device. None takes the inputs that the model was built for. Targets that are
            not given are of the outputs' shape, or classes if the loss wants those.
            Defaults to `None`.
        batch_size: Int or None. Of a model: examples of one device, where `batch` does
            not say. Defaults to `None`.
        sequence_length: Int or None. Of a model: length of other axes that it leaves
            open. Defaults to `None`.
        optimizer: Of a model: a `keras.optimizers.Optimizer`, the name of one, or None:
            that of the compiled model, or Adam. Defaults to `None`.
        expert_parallel_size: Int or None. Of a model: devices that together have all
            experts; divides `num_devices`. None means the fastest that fits. Defaults
            to `None`.

    Returns:
        A `Plan` of a preset, a `ModelPlan` of a model.

    Raises:
        FileNotFoundError: There is neither a cluster of that name nor a file.
        ValueError: A number is out of range, or no number of devices is known; an
            option of presets is given for a model or the reverse; the model is not
            built, or its batch is not known.

    Example:

    >>> found = keras_moe.planning.plan("moe_131072_h", "k40")
    >>> found.num_devices, found.min_devices, found.work.expert_ratio
    (128, 128, 1024.0)

    Reference:
        Shazeer et al. 2017, sections 3.1 and 3.2, appendix D.
    """
    imbalance = checks.verify_number(imbalance, "imbalance", "[1, inf)")
    common: dict[str, Any] = {
        "num_devices": num_devices,
        "recompute": recompute,
        "imbalance": imbalance,
    }
    of_presets: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "expert_optimizer": expert_optimizer,
        "shard_vocabulary": shard_vocabulary,
    }
    of_models = {
        "batch": batch,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "optimizer": optimizer,
        "expert_parallel_size": expert_parallel_size,
    }
    if hasattr(model, "trainable_variables"):
        _verify_absent(of_presets, "a preset", "a model", "Pass `batch_size`")
        from keras_moe.planning.traced.own_model import plan_model

        return plan_model(model, load_cluster(cluster), **common, **of_models)
    _verify_absent(of_models, "a model", "a preset", "Pass `batch_tokens`")
    return _plan_preset(model, load_cluster(cluster), **common, **of_presets)


def _verify_absent(options, of, given, remedy):
    for name, value in options.items():
        if value is not None and value is not False:
            raise ValueError(
                f"`{name}` is an option of {of}. Received: {name}={value!r} for {given}. "
                f"{remedy}, or leave it out."
            )


def _plan_preset(
    preset: Preset | str,
    cluster: Cluster,
    *,
    num_devices: int | None = None,
    batch_tokens: int | None = None,
    recompute: bool | None = None,
    expert_optimizer: str | None = None,
    shard_vocabulary: bool = False,
    imbalance: float = 1.15,
) -> Plan:
    preset = as_preset(preset)
    changed: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "recompute": recompute,
        "expert_optimizer": expert_optimizer,
    }
    preset = dataclasses.replace(
        preset, **{k: v for k, v in changed.items() if v is not None}
    )
    devices = cluster.num_devices or preset.num_devices
    devices = devices if num_devices is None else num_devices
    if devices is None:
        raise ValueError(
            "`num_devices` must be given where neither cluster nor preset has it. "
            f"Received: num_devices=None for {preset.name!r} on {cluster.name!r}."
        )
    devices = checks.verify_positive_int(devices, "num_devices")
    placement = place(preset, devices, shard_vocabulary)
    tokens = preset.batch_tokens / devices
    over_mean = placement.rows_over_mean(imbalance)
    memory, other_memory = (
        memory_of(
            dataclasses.replace(preset, recompute=r), placement, tokens, over_mean
        )
        for r in (preset.recompute, not preset.recompute)
    )
    work = work_of(preset, count(preset), placement, preset.batch_tokens)
    return Plan(
        preset,
        cluster,
        preset.batch_tokens,
        imbalance,
        placement,
        memory,
        other_memory,
        work,
        step_seconds(
            preset,
            work,
            placement,
            cluster,
            preset.batch_tokens,
            preset.recompute,
            imbalance,
        ),
        _min_devices(preset, cluster, shard_vocabulary),
    )


def _min_devices(preset, cluster, shard_vocabulary):
    """The least power of two on which weights, slots and gradients fit, or 0."""
    devices = 1
    # Beyond one device for each group nothing gets smaller.
    while devices < 2 * max(1, preset.num_experts):
        placement = place(preset, devices, shard_vocabulary)
        if memory_of(preset, placement, 0).parameters <= cluster.usable_memory:
            return devices
        devices *= 2
    return 0
