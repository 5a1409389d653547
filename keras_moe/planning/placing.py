"""Where experts and other weights live on the devices of a cluster."""

import dataclasses

import numpy as np

from keras_moe import checks
from keras_moe.distribution.topology import Shards, make_shards
from keras_moe.models.presets import Preset, as_preset


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """What a device holds of the model.

    The experts of one mixture lie in runs on the devices; a group of a
    hierarchical mixture with its secondary gate lies on one device. All other
    weights are on every device, but the vocabulary if it is sharded.

    Attributes:
        num_devices: Int, R.
        shards: `Shards` of the experts of one mixture, None without.
        group_size: Int. Experts that stay together.
        vocabulary_sharded: Bool. Whether the rows of embedding and softmax are
            shared among the devices.
    """

    num_devices: int
    shards: Shards | None
    group_size: int
    vocabulary_sharded: bool

    @property
    def most_experts(self) -> int:
        """Experts of one mixture on the device that has most."""
        return 0 if self.shards is None else int(self.shards.sizes.max())

    @property
    def idle_devices(self) -> int:
        """Devices that have no expert."""
        return 0 if self.shards is None else int(np.sum(self.shards.sizes == 0))

    def experts_of(self, device: int) -> range:
        """The experts of a device.

        Args:
            device: Int, below `num_devices`.

        Returns:
            Range of their numbers.
        """
        checks.verify_int(device, "device", 0, self.num_devices - 1)
        return range(0) if self.shards is None else self.shards.experts_of(device)

    def groups_of(self, device: int) -> range:
        """The groups of a hierarchical mixture on a device; experts of a flat one."""
        experts = self.experts_of(device)
        return range(experts.start // self.group_size, experts.stop // self.group_size)

    def rows_over_mean(self, imbalance: float) -> float:
        """Rows of experts on the busiest device over the mean of all devices.

        Args:
            imbalance: Float. The same among devices with equally many experts.

        Returns:
            Float, at least `imbalance`: some devices have more experts.
        """
        imbalance = checks.verify_number(imbalance, "imbalance", "[1, inf)")
        if self.shards is None:
            return imbalance
        share = self.most_experts / self.shards.num_experts
        return imbalance * share * self.num_devices

    def vocabulary_share(self, vocabulary_size: int) -> float:
        """The share of the vocabulary on the device that has most, at most 1."""
        checks.verify_int(vocabulary_size, "vocabulary_size")
        if not self.vocabulary_sharded:
            return 1.0
        return -(-vocabulary_size // self.num_devices) / vocabulary_size


def place(preset: Preset, num_devices: int, vocabulary_sharded: bool) -> Placement:
    """Shares a model among devices, as the layers of this package do.

    Args:
        preset: A `Preset`.
        num_devices: Int.
        vocabulary_sharded: Bool. Whether to share the vocabulary too.

    Returns:
        The `Placement`.

    Reference:
        Shazeer et al. 2017, section 3.1.
    """
    preset = as_preset(preset)
    num_devices = checks.verify_int(num_devices, "num_devices")
    shards = None
    group_size = preset.group_size if preset.num_groups else 1
    if preset.middle == "moe":
        shards = make_shards(preset.num_experts, num_devices, group_size)
    return Placement(num_devices, shards, group_size, vocabulary_sharded)
