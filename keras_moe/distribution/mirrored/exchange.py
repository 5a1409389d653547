"""How rows travel to the replicas of their experts and back. Nothing is dropped.

Rows sorted by expert are sorted by replica as well, since a replica holds a run
of experts. Every replica learns how many rows every other one has for every expert,
so that all agree on the length of a block: one block for each pair of replicas,
padded to the fullest. One all-to-all takes the blocks to the experts, another
takes the answers back; the gradient of each is again an all-to-all.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_moe.distribution.topology import Shards


class Route(NamedTuple):
    """Where the rows of one replica go, and where the rows it gets belong.

    P replicas, those of an expert-parallel group, exchange their rows.

    Attributes:
        slots: `(P, C)` int32. The row in each slot of the blocks that leave, -1
            where a slot is empty.
        positions: `(M,)` int32. The slot of each row.
        incoming: `(M_in,)` int32. For each row that arrives, sorted by expert,
            its slot in the blocks that arrive.
        incoming_slots: `(P, C)` int32. The reverse of `incoming`, -1 for empty.
        counts: `(E_own,)` int32. Rows that arrive for each own expert.
    """

    slots: tf.Tensor
    positions: tf.Tensor
    incoming: tf.Tensor
    incoming_slots: tf.Tensor
    counts: tf.Tensor


def make_route(counts: tf.Tensor, shards: Shards, position: int) -> Route:
    """Lays out the exchange for one replica.

    Args:
        counts: `(P, E)` int32, rows of every replica of its group for every expert.
        shards: Which expert lives where.
        position: That of the replica to lay out for, in its group.

    Returns:
        The `Route`. Rows of an expert arrive in the order of the replicas they
        come from: the order they would have on one device.
    """
    num_replicas = shards.group_size
    rows_PP = tf.transpose(
        tf.math.unsorted_segment_sum(
            tf.transpose(counts), tf.constant(shards.owners(), tf.int32), num_replicas
        )
    )  # from replica, to replica
    length = tf.maximum(tf.reduce_max(rows_PP), 1)
    ranks = tf.range(length)[tf.newaxis, :]
    # Out: rows lie in the order of their replicas.
    outgoing = rows_PP[position]
    starts = tf.cumsum(outgoing, exclusive=True)[:, tf.newaxis]
    slots = tf.where(ranks < outgoing[:, tf.newaxis], starts + ranks, -1)
    positions = _runs(tf.range(num_replicas) * length, outgoing)
    # In: a block holds rows sorted by expert; they are merged over the blocks.
    own = shards.experts_of(position)
    own_counts = counts[:, own.start : own.stop]  # (P, E_own)
    first = tf.range(num_replicas)[:, tf.newaxis] * length
    first += tf.cumsum(own_counts, axis=1, exclusive=True)
    incoming = _runs(
        tf.reshape(tf.transpose(first), [-1]),
        tf.reshape(tf.transpose(own_counts), [-1]),
    )
    num_slots = num_replicas * length
    # Slots are unique: the scatter is deterministic.
    incoming_slots = tf.tensor_scatter_nd_update(
        tf.fill([num_slots], -1), incoming[:, tf.newaxis], tf.range(tf.size(incoming))
    )
    return Route(
        slots,
        positions,
        incoming,
        tf.reshape(incoming_slots, [num_replicas, length]),
        tf.reduce_sum(own_counts, axis=0),
    )


def _runs(firsts, lengths):
    """`[f, f + 1, ..., f + n - 1]` for each first f and length n, one after other."""
    which = tf.repeat(tf.range(tf.size(lengths)), lengths)
    skipped = tf.cumsum(lengths, exclusive=True)
    return tf.gather(firsts - skipped, which) + tf.range(tf.size(which))


def to_experts(
    rows: tf.Tensor, route: Route, all_to_all: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Takes rows to the replicas of their experts.

    Args:
        rows: `(M, D)` sorted by expert.
        route: Of this replica.
        all_to_all: `(P, C, D)` -> `(P, C, D)`; its gradient is itself.

    Returns:
        `(M_in, D)`, the rows for the experts of this replica, sorted by expert.
    """
    blocks = moved(rows, route.slots, route.positions)
    return moved(all_to_all(blocks), route.incoming, route.incoming_slots)


def from_experts(
    rows: tf.Tensor, route: Route, all_to_all: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Takes answers back to where their rows came from.

    Args:
        rows: `(M_in, D)` sorted by expert.
        route: Of this replica.
        all_to_all: `(P, C, D)` -> `(P, C, D)`; its gradient is itself.

    Returns:
        `(M, D)` in the order of what `to_experts` took.
    """
    blocks = moved(rows, route.incoming_slots, route.incoming)
    return moved(all_to_all(blocks), route.positions, route.slots)


def over_columns(
    values: tf.Tensor,
    num_rows: tf.Tensor,
    num_replicas: int,
    function: Callable[[tf.Tensor], tf.Tensor],
    filling: float,
    all_to_all: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """Applies a function to columns that run over the rows of all replicas.

    Every replica takes a share of the columns, whole, and sends back what the
    function says of them: 1 / R of what gathering all values would move.

    Args:
        values: `(N, E)` float, the rows of this replica.
        num_rows: `(R,)` int32, N of every replica.
        num_replicas: R.
        function: `(rows, columns)` -> bool of that shape.
        filling: Value of rows and columns that pad the blocks.
        all_to_all: `(R, L, C)` -> `(R, L, C)`.

    Returns:
        `(N, E)` bool. No gradient.
    """
    num_columns = values.shape[1]
    share = -(-num_columns // num_replicas)
    length = tf.maximum(tf.reduce_max(num_rows), 1)
    num_own = tf.shape(values)[0]
    blocks = tf.pad(
        tf.stop_gradient(values),
        [[0, length - num_own], [0, num_replicas * share - num_columns]],
        constant_values=filling,
    )  # (L, R * C)
    blocks = tf.transpose(tf.reshape(blocks, [-1, num_replicas, share]), [1, 0, 2])
    received = tf.ensure_shape(all_to_all(blocks), (num_replicas, None, share))
    answers = function(tf.reshape(received, [-1, share]))
    # Collectives move numbers, not truth values.
    answers = tf.reshape(tf.cast(answers, values.dtype), [num_replicas, -1, share])
    answers = tf.transpose(all_to_all(answers), [1, 0, 2])  # (L, R, C)
    answers = tf.reshape(answers, [-1, num_replicas * share])
    return answers[:num_own, :num_columns] > 0.5


def moved(x: tf.Tensor, index: tf.Tensor, inverse: tf.Tensor) -> tf.Tensor:
    """Rows of `x` at `index`; the gradient gathers too, at `inverse`.

    Of `index` and `inverse` the one of rank 2 may hold -1, which gives zeros.

    Args:
        x: `(..., D)`.
        index: Ints of rank 1 or 2.
        inverse: Ints of the other rank.

    Returns:
        `(*index.shape, D)`.
    """

    @tf.custom_gradient
    def move(x):
        return rows_at(x, index), lambda dy: rows_at(dy, inverse)

    return move(x)


def rows_at(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Rows of `x`, in any number of leading axes, at `index`; see `moved`."""
    x = tf.reshape(x, [-1, x.shape[-1]])
    if index.shape.rank == 1:
        return tf.gather(x, index)
    return tf.gather(tf.pad(x, [[1, 0], [0, 0]]), index + 1)
