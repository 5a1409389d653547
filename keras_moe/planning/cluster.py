"""What a cluster is made of, as far as planning needs to know."""

import dataclasses
import json
import math
from importlib import resources
from pathlib import Path

from keras_moe import checks

_POSITIVE = (
    "memory_gb",
    "teraflops",
    "efficiency",
    "memory_gb_per_second",
    "network_gb_per_second",
    "node_gb_per_second",
)


# Part of a device's memory that planning leaves to the runtime.
_RESERVED = 0.1


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Devices of one kind, and the network between them.

    Rates are those of one device. A gigabyte has 10^9 bytes.

    Attributes:
        name: Str.
        device: Str. The kind of device.
        num_devices: Int or None. None: as many as the paper used for the preset.
        memory_gb: Float. Memory of a device.
        teraflops: Float. Peak rate, a multiply-add being 2.
        efficiency: Float, at most 1. The share of the peak that large matrix
            products reach in training.
        memory_gb_per_second: Float. Memory rate.
        network_gb_per_second: Float. To devices of other nodes, each way.
        devices_per_node: Int. Devices that share a node. Defaults to `1`.
        node_gb_per_second: Float or None. To devices of the same node, each way;
            None means that of the network. Defaults to `None`.
        launch_microseconds: Float. Between one operation and the next on a
            device, in which it does nothing. Defaults to `5`.
        message_microseconds: Float. Delay of a message to one other device.
            Defaults to `20`.
        sources: Tuple of str. Where the figures come from; which are assumed.

    Raises:
        ValueError: A number is not positive, or `efficiency` is above 1.
    """

    name: str
    device: str
    num_devices: int | None
    memory_gb: float
    teraflops: float
    efficiency: float
    memory_gb_per_second: float
    network_gb_per_second: float
    devices_per_node: int = 1
    node_gb_per_second: float | None = None
    launch_microseconds: float = 5.0
    message_microseconds: float = 20.0
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        if self.num_devices is not None:
            checks.verify_positive_int(self.num_devices, "num_devices")
        checks.verify_positive_int(self.devices_per_node, "devices_per_node")
        if self.node_gb_per_second is None:
            object.__setattr__(self, "node_gb_per_second", self.network_gb_per_second)
        for name in _POSITIVE:
            where = f" in {self.name!r}. Correct it."
            value = checks.verify_number(getattr(self, name), name, "(0, inf)", where)
            object.__setattr__(self, name, value)
        for name in ("launch_microseconds", "message_microseconds"):
            checks.verify_weight(getattr(self, name), name)
        checks.verify_number(self.efficiency, "efficiency", "(0, 1]")

    @property
    def memory(self) -> float:
        """Bytes of memory of a device."""
        return self.memory_gb * 1e9

    @property
    def usable_memory(self) -> float:
        """Bytes of a device without what planning leaves to the runtime, a tenth."""
        return self.memory * (1 - _RESERVED)

    @property
    def flops(self) -> float:
        """Operations a second that large products reach on a device."""
        return self.teraflops * 1e12 * self.efficiency

    def ratio(self, itemsize: int = 4) -> float:
        """Multiply-adds that a device does while it sends one number.

        Args:
            itemsize: Int. Bytes of a number. Defaults to `4`.

        Returns:
            Float. By the paper's rule an expert has to do more than these for
            each number of its input and output, or the network bounds it.

        Reference:
            Shazeer et al. 2017, section 3.2.
        """
        itemsize = checks.verify_int(itemsize, "itemsize")
        numbers = self.network_gb_per_second * 1e9 / itemsize
        return self.flops / 2 / numbers

    def exchange_seconds(self, sent: float, num_devices: int) -> float:
        """Time in which every device sends bytes evenly to all others.

        Args:
            sent: Bytes that leave a device.
            num_devices: Int. Devices that take part.

        Returns:
            Float. Those for its own node and those for other nodes go one after
            the other, and every other device costs one message.
        """
        sent = checks.verify_number(sent, "sent")
        if checks.verify_int(num_devices, "num_devices") < 2:
            return 0.0
        near = min(self.devices_per_node, num_devices) - 1
        share = near / (num_devices - 1)
        assert self.node_gb_per_second is not None
        seconds = sent * share / (self.node_gb_per_second * 1e9)
        seconds += sent * (1 - share) / (self.network_gb_per_second * 1e9)
        return seconds + (num_devices - 1) * self.message_microseconds * 1e-6

    def reduction_seconds(self, size: float, num_devices: int) -> float:
        """Time in which an array of every device is summed over all of them.

        First within the nodes, whose devices then each sum their part with the other
        nodes, and hand it to the devices of their own: rings, with a message for each
        doubling of the devices.

        Args:
            size: Bytes of the array.
            num_devices: Int. Devices that take part.

        Returns:
            Float.
        """
        size = checks.verify_number(size, "size")
        if checks.verify_int(num_devices, "num_devices") < 2 or not size:
            return 0.0
        near = min(self.devices_per_node, num_devices)
        nodes = num_devices / near
        assert self.node_gb_per_second is not None
        seconds = 2 * size * (near - 1) / near / (self.node_gb_per_second * 1e9)
        far = 2 * size / near * (nodes - 1) / nodes
        seconds += far / (self.network_gb_per_second * 1e9)
        messages = 2 * math.log2(num_devices)
        return seconds + messages * self.message_microseconds * 1e-6

    def far_reduction_seconds(
        self, size: float, num_devices: int, group_size: int
    ) -> float:
        """Time in which the same experts of all groups are summed.

        Args:
            size: Bytes of an array of a device.
            num_devices: Int. Devices of all groups.
            group_size: Int. Devices of a group, which have different arrays; they are
                neighbors.

        Returns:
            Float.
        """
        group_size = checks.verify_int(group_size, "group_size", 1, num_devices)
        near = max(1, self.devices_per_node // group_size)
        one_a_node = dataclasses.replace(self, devices_per_node=near)
        return one_a_node.reduction_seconds(size, num_devices // group_size)


def cluster_names() -> list[str]:
    """Names of the clusters that come with the package."""
    return sorted(
        file.name.removesuffix(".json")
        for file in (resources.files("keras_moe.planning") / "clusters").iterdir()
        if file.name.endswith(".json")
    )


def load_cluster(cluster: str | Path | Cluster) -> Cluster:
    """Reads a cluster.

    Args:
        cluster: A name of `cluster_names()`, or the path of a JSON file with the
            attributes of `Cluster`. A `Cluster` is returned as it is.

    Returns:
        The `Cluster`.

    Raises:
        FileNotFoundError: There is neither a cluster of that name nor a file.
        ValueError: The file is no JSON object, has other keys, lacks one, or a
            value is out of range.

    Example:

    >>> keras_moe.planning.load_cluster("k40").memory_gb
    12
    """
    if isinstance(cluster, Cluster):
        return cluster
    if str(cluster) in cluster_names():
        file = resources.files("keras_moe.planning") / "clusters" / f"{cluster}.json"
        return _parse(file, f"{cluster}.json")
    path = Path(cluster)
    if not path.is_file():
        raise FileNotFoundError(
            f"`cluster` must be one of {', '.join(cluster_names())}, or a JSON file. "
            f"Received: cluster={str(cluster)!r}, which is no file."
        )
    return _parse(path, str(path))


def _parse(file, name):
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`cluster` must be a file of JSON. Received: {name}: {error}. "
            "Copy keras_moe/planning/clusters/k40.json and change it."
        ) from error
    fields = dataclasses.fields(Cluster)
    known = {field.name for field in fields}
    needed = {f.name for f in fields if f.default is dataclasses.MISSING}
    given = set(values) if isinstance(values, dict) else set()
    if not needed <= given <= known:
        raise ValueError(
            f"`cluster` must have the keys {sorted(needed)}, and may have "
            f"{sorted(known - needed)}. Received: {name} without "
            f"{sorted(needed - given)} and with {sorted(given - known)} besides."
        )
    sources = checks.verify_texts(values.get("sources", ()), "sources")
    return Cluster(**{**values, "sources": tuple(sources)})
