"""Which expert lives on which replica. NumPy only: no TensorFlow, no Keras."""

import math
from typing import NamedTuple

import numpy as np


class Shards(NamedTuple):
    """A contiguous run of experts for every replica.

    Attributes:
        sizes: `(R,)` int64. Experts of each replica; may be 0.
        starts: `(R,)` int64. First expert of each replica.
        num_experts: E, the sum of `sizes`.
    """

    sizes: np.ndarray
    starts: np.ndarray
    num_experts: int

    @property
    def num_replicas(self) -> int:
        """R."""
        return len(self.sizes)

    def experts_of(self, replica: int) -> range:
        """The experts that live on a replica, in order."""
        start = int(self.starts[replica])
        return range(start, start + int(self.sizes[replica]))

    def owners(self) -> np.ndarray:
        """`(E,)` int64: the replica of each expert."""
        return np.repeat(np.arange(self.num_replicas), self.sizes)


def make_shards(num_experts: int, num_replicas: int, together: int = 1) -> Shards:
    """Shares experts among replicas as evenly as can be.

    Replicas hold runs of experts in order. Where the numbers do not divide, the
    first replicas hold more; with more replicas than experts the last hold none.

    Args:
        num_experts: E.
        num_replicas: R.
        together: Experts of one group of a hierarchical mixture: groups are not
            split, so that a secondary mixture lives on one replica. Divides E.
            Defaults to `1`.

    Returns:
        The `Shards`.

    Raises:
        ValueError: A number is below 1, or `together` does not divide
            `num_experts`.

    Reference:
        Shazeer et al. 2017, section 3.1: one copy of each expert in the cluster,
        and for a hierarchical mixture each secondary mixture on one device.
    """
    for name, value in (
        ("num_experts", num_experts),
        ("num_replicas", num_replicas),
        ("together", together),
    ):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}.")
    if num_experts % together:
        raise ValueError(
            "`together` must divide `num_experts`. Received: "
            f"together={together}, num_experts={num_experts}. Groups of experts "
            "have equal sizes."
        )
    units, more = divmod(num_experts // together, num_replicas)
    sizes: np.ndarray = np.full(num_replicas, units, np.int64)
    sizes[:more] += 1
    sizes *= together
    return Shards(sizes, np.cumsum(sizes) - sizes, int(num_experts))


def shard_bytes(shards: Shards, shape: tuple, itemsize: int) -> np.ndarray:
    """Bytes that each replica holds of a stacked weight.

    Args:
        shards: From `make_shards`.
        shape: Shape of the whole weight, `(E, ...)`.
        itemsize: Bytes of one element.

    Returns:
        `(R,)` int64.
    """
    return shards.sizes * (math.prod(shape[1:]) * itemsize)


def exchange_bytes(
    num_tokens: int, k: float, features: float, itemsize: int, num_replicas: int
) -> int:
    """Bytes that leave a replica in one training step of one mixture.

    Routing is taken to be even, padding is not counted. Of the k rows of a token
    the share `(R - 1) / R` goes to other replicas, four times over: to the experts
    and back, and the same for the gradients.

    Args:
        num_tokens: Tokens of the global batch.
        k: Experts for each token.
        features: Features of a row, the mean of an expert's input and output.
        itemsize: Bytes of one element.
        num_replicas: R.

    Returns:
        Bytes sent by one replica, a whole number.
    """
    rows = num_tokens * k / num_replicas
    away = (num_replicas - 1) / num_replicas
    return round(4 * rows * away * features * itemsize)
