"""Which buffers are there at the same time when a graph runs."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Operations that touch less are run at once where they become ready; TensorFlow's
# executor hands the others to its pool, whose newest task is taken first.
_CHEAP_BYTES = 1 << 15


class Peak(NamedTuple):
    """The most that is there at once.

    Attributes:
        peak: Bytes.
        at: The node that runs then, None if there is none.
        live: The values that own buffers then, with their bytes.
    """

    peak: int
    at: Any
    live: list[tuple[Any, int]]


class _Storage:
    """A buffer, which one value after another may own."""

    __slots__ = ("owner", "size", "uses")

    def __init__(self, owner, size, uses):
        self.owner, self.size, self.uses = owner, size, uses


def simulate(
    nodes: Sequence[Any],
    size: Callable[[Any], int],
    order: Sequence[Any] | None = None,
    more: Mapping[int, int] | None = None,
) -> Peak:
    """Runs a list of nodes as TensorFlow's executor does with one thread.

    Args:
        nodes: `Node`s of an `Interpreter`.
        size: Bytes of a value's buffer on the device at hand.
        order: From `order_of`; None makes it. Defaults to `None`.
        more: Bytes that are there besides while a node runs, by its `id`. Defaults to
            none.

    Returns:
        The `Peak`, in which what stays from step to step does not count.
    """
    more = more or {}
    uses: collections.Counter = collections.Counter()
    for node in nodes:
        uses.update({id(value.buffer) for value in node.inputs})
    storages: dict[int, _Storage] = {}
    live: dict[int, _Storage] = {}
    total, best = 0, Peak(0, None, [])

    def allocate(value):
        nonlocal total
        storage = _Storage(value, size(value), uses[id(value)])
        storages[id(value)] = live[id(storage)] = storage
        total += storage.size

    def free(storage):
        nonlocal total
        if storage.uses <= 0 and live.pop(id(storage), None) is not None:
            total -= storage.size

    def release(node):
        for buffer in {id(value.buffer) for value in node.inputs}:
            if buffer in storages:
                storages[buffer].uses -= 1
                free(storages[buffer])

    def note(node):
        nonlocal best
        found = total + node.temporary + more.get(id(node), 0)
        if found > best.peak:
            held = [(s.owner, s.size) for s in live.values()]
            best = Peak(found, node, held)

    for node in order or order_of(nodes):
        fresh = [v for v in node.outputs if v.root is None and not v.is_kept]
        if node.is_loop:  # what it takes goes while what it gives comes
            note(node)
            release(node)
            for value in fresh:
                allocate(value)
            note(node)
        else:
            taken = _taken_over(node, fresh, storages, size)
            if taken is not None:
                taken.owner, taken.uses = fresh[0], taken.uses + uses[id(fresh[0])]
                storages[id(fresh[0])] = taken
            for value in fresh[taken is not None :]:
                allocate(value)
            note(node)
            release(node)
        for value in fresh:
            free(storages[id(value)])
    return best


def _taken_over(node, fresh, storages, size):
    """The storage of an input that nobody else needs, for the first result."""
    for index in node.takes_over if fresh else ():
        source = node.inputs[index]
        storage = storages.get(id(source.buffer))
        own = {
            id(v.buffer) for v in node.inputs if storages.get(id(v.buffer)) is storage
        }
        if (
            storage is not None
            and storage.uses == len(own)
            and storage.size == size(fresh[0])
            and source.dtype == fresh[0].dtype
        ):
            return storage
    return None


def order_of(nodes: Sequence[Any], keep_first: bool = False) -> list[Any]:
    """An order in which an executor with one thread may run nodes.

    Args:
        nodes: `Node`s, each after those that it needs.
        keep_first: Bool. Whether the thread goes on with the first of the nodes that
            have become ready, else with the last. Defaults to `False`.

    Returns:
        The same nodes.
    """
    maker = {id(value): node for node in nodes for value in node.outputs}
    followers = collections.defaultdict(list)
    waits = {}
    for node in nodes:
        before = {id(maker[id(v)]) for v in node.inputs if id(v) in maker}
        before |= {id(each) for each in node.after}
        waits[id(node)] = len(before)
        for each in before:
            followers[each].append(node)
    order: list[Any] = []
    queue = collections.deque(node for node in nodes if not waits[id(node)])
    pool: collections.deque = collections.deque()
    first = {id(node) for node in queue}
    kept = None
    while queue or kept is not None or pool:
        if queue:
            node = queue.popleft()
        elif kept is not None:
            node, kept = kept, None
        else:
            node = pool.popleft()
        order.append(node)
        for follower in followers[id(node)]:
            waits[id(follower)] -= 1
            if waits[id(follower)]:
                continue
            # What an update makes of variables alone comes first, and waits.
            early = id(node) in first and not follower.multiply_adds and bool(queue)
            if early or _is_cheap(follower):
                queue.append(follower)
            elif kept is None:
                kept = follower
            elif keep_first:
                pool.appendleft(follower)
            else:
                pool.appendleft(kept)
                kept = follower
    return order


def _is_cheap(node):
    fresh = sum(v.num_bytes for v in node.outputs if v.root is None)
    taken = 0 if fresh == 0 else sum(v.num_bytes for v in node.inputs)
    return not node.multiply_adds and fresh + taken < _CHEAP_BYTES
