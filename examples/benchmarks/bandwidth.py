"""What this machine's memory leaves of a step: its limit for many experts.

    python examples/benchmarks/bandwidth.py

Many experts and few tokens are bound by memory: every weight is read for a few rows. Here
bytes a second are measured by NumPy, with a thread for each core: reading, writing to
memory that is in use, and writing to new pages, which the system has to clear first, as
for every large tensor that TensorFlow makes. From these comes the least time of a step
for what it can't leave out: a forward pass reads the weights of the experts once; a
training step reads them twice and writes gradients of their size to new pages; the
optimizer reads these, and reads and writes weights and slots. Products take their time,
too, at best at the same time. So the limit of a step is the longer of the two: the time of
the dense layer of equal operations, and that of the memory.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from alternating import seconds

# In parts that threads take one by one, each too large for a cache, and for the pages that
# glibc's allocator keeps: above 32 MiB every array has new ones.
BYTES, PARTS = 2**29, 8
# Arrays of the size of a weight that an optimizer reads, and writes, for each weight.
OPTIMIZERS = {"sgd": (2, 1), "adam": (4, 3), "factored_adam": (2, 1)}


class Bandwidth(NamedTuple):
    """Bytes a second of some threads: reading, writing, writing to new pages."""

    read: float
    write: float
    new_pages: float
    threads: int

    def __str__(self):
        return (
            f"memory: {self.read / 1e9:.1f} GB/s read, {self.write / 1e9:.1f} written, "
            f"{self.new_pages / 1e9:.1f} to new pages, {self.threads} threads"
        )

    def least_seconds(self, step, weight_bytes, optimizer=None):
        """Time of the memory for one step.

        Args:
            step: `"forward"` or `"training"`.
            weight_bytes: Of the experts that have tokens.
            optimizer: None or a key of `OPTIMIZERS`: the step ends with its update.
                Defaults to `None`.
        """
        read, written = (0, 0) if optimizer is None else OPTIMIZERS[optimizer]
        if step == "forward":
            return weight_bytes / self.read
        return weight_bytes * (
            (2 + read) / self.read + written / self.write + 1 / self.new_pages
        )

    def seconds_after_products(self, step, weight_bytes, optimizer=None):
        """Time of the memory for what products do not do themselves, in memory in use.

        The gradients of the experts are read and written once more, as one array, and the
        optimizer has its passes.

        Args:
            step: As for `least_seconds`.
            weight_bytes: Likewise.
            optimizer: Likewise.
        """
        if step == "forward":
            return 0.0
        read, written = (0, 0) if optimizer is None else OPTIMIZERS[optimizer]
        return weight_bytes * ((1 + read) / self.read + (1 + written) / self.write)


def weight_bytes(num_experts, units, hidden_units):
    """Bytes of the weights of experts with one hidden layer, in float32."""
    return 4 * num_experts * 2 * units * hidden_units


# Two columns of a table: the limit of a step, and how near it came.
HEADER, LINES = " limit (ms) | limit / {} |", "---|---|"


def cells(seconds_, least, memory_seconds):
    """What stands in these columns.

    Args:
        seconds_: Of the step.
        least: Seconds of what has equal operations and few weights.
        memory_seconds: From `least_seconds`.
    """
    limit = max(least, memory_seconds)
    return f" {limit * 1e3:.1f} | {limit / seconds_:.2f} |"


def measure(threads=None, quick=False):
    """The `Bandwidth` of this machine now: the best of some runs.

    Args:
        threads: None for one a core.
        quick: Whether a small array will do, once, that only shows that it works.
    """
    num_bytes, repeat = (2**20, 1) if quick else (BYTES, 5)
    threads = threads or os.cpu_count()
    array = np.ones(num_bytes // 4, "float32")
    parts = np.array_split(array, PARTS)

    def fill_new(part):
        np.empty_like(part).fill(1.0)

    with ThreadPoolExecutor(threads) as pool:

        def best(function):
            def run():
                return len(list(pool.map(function, parts)))

            return num_bytes / min(seconds(run) for _ in range(repeat))

        return Bandwidth(
            best(lambda part: np.dot(part, part)),
            best(lambda part: part.fill(1.0)),
            best(fill_new),
            threads,
        )


if __name__ == "__main__":
    print(measure())
