"""Which expert lives on which replica. NumPy only: no TensorFlow, no Keras."""

import math
from typing import NamedTuple

import numpy as np


class Shards(NamedTuple):
    """A contiguous run of experts for every replica of an expert-parallel group.

    Replicas 0 to P - 1 are the first group, the next P the second. Each group holds
    all experts, each of its positions the same run of them.

    Attributes:
        sizes: `(P,)` int64. Experts of each position; may be 0.
        starts: `(P,)` int64. First expert of each position.
        num_experts: E, the sum of `sizes`.
        num_groups: G, how often each expert is there.
    """

    sizes: np.ndarray
    starts: np.ndarray
    num_experts: int
    num_groups: int = 1

    @property
    def group_size(self) -> int:
        """P, the expert-parallel size."""
        return len(self.sizes)

    @property
    def num_replicas(self) -> int:
        """R = G * P."""
        return self.num_groups * self.group_size

    def group_of(self, replica: int) -> int:
        """The group of a replica."""
        return replica // self.group_size

    def position_of(self, replica: int) -> int:
        """The position of a replica in its group."""
        return replica % self.group_size

    def members_of(self, group: int) -> range:
        """The replicas of a group."""
        return range(group * self.group_size, (group + 1) * self.group_size)

    def experts_of(self, replica: int) -> range:
        """The experts that live on a replica, in order."""
        position = self.position_of(replica)
        start = int(self.starts[position])
        return range(start, start + int(self.sizes[position]))

    def owners(self) -> np.ndarray:
        """`(E,)` int64: the position of each expert in every group."""
        return np.repeat(np.arange(self.group_size), self.sizes)

    def whole_group_in(self, replicas: range) -> range | None:
        """Those of consecutive replicas that hold all experts, None if none do."""
        members = self.members_of(-(-replicas.start // self.group_size))
        return members if members.stop <= replicas.stop else None


def make_shards(
    num_experts: int,
    num_replicas: int,
    together: int = 1,
    group_size: int | None = None,
) -> Shards:
    """Shares experts among replicas as evenly as can be.

    Replicas hold runs of experts in order. Where the numbers do not divide, the
    first replicas hold more; with more replicas than experts the last hold none.

    Args:
        num_experts: E.
        num_replicas: R.
        together: Experts of one group of a hierarchical mixture: groups are not
            split, so that a secondary mixture lives on one replica. Divides E.
            Defaults to `1`.
        group_size: P, replicas of an expert-parallel group, each of which holds all
            experts. Divides R. None means R, one group. Defaults to `None`.

    Returns:
        The `Shards`.

    Raises:
        ValueError: A number is below 1, `together` does not divide `num_experts`, or
            `group_size` not `num_replicas`.

    Reference:
        Shazeer et al. 2017, section 3.1: one copy of each expert in the cluster,
        and for a hierarchical mixture each secondary mixture on one device.
    """
    group_size = num_replicas if group_size is None else group_size
    for name, value in (
        ("num_experts", num_experts),
        ("num_replicas", num_replicas),
        ("together", together),
        ("group_size", group_size),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")
    if num_experts % together:
        raise ValueError(
            "`together` must divide `num_experts`. Received: "
            f"together={together}, num_experts={num_experts}. Groups of experts "
            "have equal sizes."
        )
    if num_replicas % group_size:
        raise ValueError(
            "`group_size` must divide `num_replicas`. Received: "
            f"group_size={group_size}, num_replicas={num_replicas}. Groups of replicas "
            "have equal sizes."
        )
    units, more = divmod(num_experts // together, group_size)
    sizes: np.ndarray = np.full(group_size, units, np.int64)
    sizes[:more] += 1
    sizes *= together
    starts = np.cumsum(sizes) - sizes
    return Shards(sizes, starts, int(num_experts), num_replicas // group_size)


def shard_bytes(
    shards: Shards, shape: tuple, itemsize: int, axis: int = 0
) -> np.ndarray:
    """Bytes that each replica holds of a stacked weight.

    Args:
        shards: From `make_shards`.
        shape: Shape of the whole weight, `(E, ...)`.
        itemsize: Bytes of one element.
        axis: That of length E. Defaults to 0.

    Returns:
        `(R,)` int64.
    """
    sizes = np.tile(shards.sizes, shards.num_groups)
    others = math.prod(shape[:axis]) * math.prod(shape[axis + 1 :])
    return sizes * (others * itemsize)


def exchange_bytes(
    num_tokens: int,
    k: float,
    features: float,
    itemsize: int,
    num_replicas: int,
    group_size: int | None = None,
) -> int:
    """Bytes that leave a replica in one training step of one mixture.

    Routing is taken to be even, padding is not counted. Of the k rows of a token
    the share `(P - 1) / P` goes to other replicas of its group, four times over: to
    the experts and back, and the same for the gradients.

    Args:
        num_tokens: Tokens of the global batch.
        k: Experts for each token.
        features: Features of a row, the mean of an expert's input and output.
        itemsize: Bytes of one element.
        num_replicas: R.
        group_size: P, replicas of an expert-parallel group. None means R. Defaults
            to `None`.

    Returns:
        Bytes sent by one replica, a whole number.
    """
    rows = num_tokens * k / num_replicas
    group_size = num_replicas if group_size is None else group_size
    away = (group_size - 1) / group_size
    return round(4 * rows * away * features * itemsize)


def gradient_bytes(shards: Shards, num_bytes: np.ndarray) -> np.ndarray:
    """Bytes that leave each replica to sum gradients over the groups, in a step.

    By a ring: each of G holders of a gradient sends the share `2 * (G - 1) / G` of it.

    Args:
        shards: From `make_shards`.
        num_bytes: `(R,)`, bytes of the gradients of each replica.

    Returns:
        `(R,)` int64; zeros with one group.
    """
    share = 2 * (shards.num_groups - 1) / shards.num_groups
    return np.round(share * num_bytes).astype(np.int64)
