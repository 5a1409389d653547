"""The most bytes of a step on one of several devices."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from keras_moe.planning.step_measures import Mixture, share_of
from keras_moe.planning.traced.liveness import order_of, simulate
from keras_moe.planning.traced.reduction import Reduction
from keras_moe.planning.traced.values import Value

# Arrays of rows that are there besides while rows travel: blocks that leave, those that
# arrive, and rows that are made of them are two at a time. From then on all rows of the
# experts are there until the last of them is used; on one device each comes when its
# expert does.
_TRAVELING, _WAITING = 2, 1


class Peaks:
    """Peaks of a step for any number of devices.

    Args:
        interpreted: Function of a `Reduction`; returns the nodes of a step.
        backward: Function of nodes; returns the `id`s of those of the backward pass.
        mixtures: Those that devices share, each with the values of its experts'
            weights.
        has_rows: Bool. Whether gradients are rows, which are gathered from all devices:
            then some values are the larger the more devices there are.
    """

    def __init__(
        self,
        interpreted: Callable[[Reduction], list[Any]],
        backward: Callable[[list[Any]], set[int]],
        mixtures: Sequence[tuple[Mixture, list[Value]]],
        has_rows: bool,
    ):
        self._interpreted, self._backward = interpreted, backward
        self._mixtures, self._has_rows = list(mixtures), has_rows
        self.peak = functools.cache(self._peak)
        self._step = functools.cache(self._make_step)

    def _peak(self, size, devices, over_mean=1.0):
        """Bytes at most on the device that has most.

        Args:
            size: Int. Devices that together have all experts.
            devices: Int. All of them.
            over_mean: Float. Rows of experts on the busiest device over the mean.

        Returns:
            Int.
        """
        holders = -(-devices // size)
        # Who sums with whom matters, and how many they are only to what grows with them.
        reduction = Reduction(devices, holders).smallest
        orders, spans, growth = self._step(reduction)
        more_devices, share = devices - reduction.devices, share_of(size)

        def held(value):
            allocated = value.allocated + more_devices * growth.get(id(value), 0)
            if value.entries is None:
                return round(allocated)
            return round(allocated * share(*value.entries))

        def besides(order):
            more = _underway(order, spans, travel)
            for node in order if growth and more_devices else ():
                grown = more_devices * growth.get(id(node), 0)
                more[id(node)] = more.get(id(node), 0) + round(grown)
            return more

        travel = [over_mean * (size > 1) * _bytes_sent(m) for m, _ in self._mixtures]
        return max(
            simulate(order, held, order, besides(order)).peak for order in orders
        )

    def _make_step(self, reduction):
        """Orders of the nodes, those of each pass of each mixture, and what grows."""
        nodes = self._interpreted(reduction)
        # Which order TensorFlow takes varies from run to run.
        orders = [order_of(nodes, keep_first) for keep_first in (False, True)]
        spans = spans_of(nodes, [w for _, w in self._mixtures], self._backward)
        growth: dict[int, float] = {}
        if self._has_rows and reduction.devices > 1:
            larger = reduction.larger
            others = self._interpreted(larger)
            growth = _growth(nodes, others, larger.devices - reduction.devices)
        return orders, spans, growth


def _growth(nodes, others, devices):
    """Bytes that values, and what runs, take more for every device more.

    Args:
        nodes: Of some devices.
        others: The same nodes of more devices.
        devices: How many more.

    Returns:
        Dict of the `id`s of those of `nodes` that grow.
    """
    found: dict[int, float] = {}
    for node, other in zip(nodes, others, strict=True):
        more = other.temporary - node.temporary
        found |= {id(node): more / devices} if more else {}
        for value, grown in zip(node.outputs, other.outputs, strict=True):
            if grown.allocated != value.allocated:
                found[id(value)] = (grown.allocated - value.allocated) / devices
    return found


def _bytes_sent(mixture):
    return mixture.rows * mixture.features * mixture.itemsize


def spans_of(
    nodes: list[Any],
    weights: list[list[Value]],
    backward: Callable[[list[Any]], set[int]],
) -> list[list[set[int]]]:
    """Products of experts, which rows have to travel to.

    Args:
        nodes: `Node`s of an `Interpreter`.
        weights: For each mixture the values of its experts' weights.
        backward: Function of nodes; returns the `id`s of those of the backward pass.

    Returns:
        For each mixture the `id`s of the products with its weights, in the forward
        pass and in the backward pass.
    """
    owners = {id(v): i for i, values in enumerate(weights) for v in values}
    later = backward(nodes)
    spans: list[list[set[int]]] = [[set(), set()] for _ in weights]
    for node in nodes:
        of = {owners[id(v.buffer)] for v in node.inputs if id(v.buffer) in owners}
        if not of:
            continue
        (owner,) = sorted(of)[:1]
        if node.multiply_adds:
            spans[owner][id(node) in later].add(id(node))
        else:  # a weight in another type or shape
            for value in node.outputs:
                if value.entries:
                    owners[id(value.buffer)] = owner
    return spans


def _underway(order, spans, travel):
    """Bytes of rows that travel or wait while a node runs, by the `id` of the node."""
    places = {id(node): i for i, node in enumerate(order)}
    more: dict[int, float] = {}
    for passes, sent in zip(spans, travel, strict=True):
        for products in passes if sent else ():
            found = sorted(places[each] for each in products)
            if not found:
                continue
            for place in range(found[0], found[-1] + 1):
                arrays = _TRAVELING if place == found[0] else _WAITING
                node = id(order[place])
                more[node] = more.get(node, 0) + arrays * sent
    return {node: math.ceil(size) for node, size in more.items()}
