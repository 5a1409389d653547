"""Rows of many experts in blocks of one expert each, for batched products.

Every expert has one block of `base` slots, for which kernels are used where they lie.
Rows beyond it spill into further blocks of `spill` slots, each with a copy of its
expert's kernel: few where routing is balanced. The two sizes are those of least work
for the counts at hand, so that skewed routing, and few tokens for many experts, cost
little more than their rows. The graph does not grow with the number of experts.
"""

import tensorflow as tf

from keras_moe.functional import ops
from keras_moe.functional.dispatching import SortedPlan


class _Blocks:
    """Which sorted row is in which slot.

    Attributes:
        rows: Row of every slot, -1 where a slot is empty: `(E, base)` and
            `(blocks, spill)`.
        slots: `(M,)`, slot of every row, base slots first.
        owners: `(blocks,)`, expert of each spill block.
    """

    def __init__(self, counts, num_rows):
        counts = tf.cast(counts, tf.int32)
        # Not known where only chosen experts are here.
        num_experts = counts.shape[0] or tf.size(counts)
        base, spill = _block_sizes(counts, num_experts)
        starts = tf.cumsum(counts, exclusive=True)
        spilled = tf.maximum(counts - base, 0)
        blocks = -(-spilled // spill)
        owners = tf.repeat(tf.range(num_experts), blocks)
        first_blocks = tf.cumsum(blocks, exclusive=True)

        def rows_at(rank, counts, starts):
            filled = rank < counts[:, tf.newaxis]
            return tf.where(filled, starts[:, tf.newaxis] + rank, -1)

        rank = (tf.range(tf.size(owners)) - tf.gather(first_blocks, owners)) * spill
        rank = base + rank[:, tf.newaxis] + tf.range(spill)
        self.rows = (
            rows_at(tf.range(base)[tf.newaxis, :], counts, starts),
            rows_at(rank, tf.gather(counts, owners), tf.gather(starts, owners)),
        )
        self.owners = owners
        row_owners = tf.repeat(tf.range(num_experts), counts)
        rank = tf.range(num_rows) - tf.gather(starts, row_owners)
        beyond = rank - base
        self.slots = tf.where(
            beyond < 0,
            row_owners * base + rank,
            num_experts * base
            + (tf.gather(first_blocks, row_owners) + beyond // spill) * spill
            + beyond % spill,
        )

    def run(self, network, inputs, weights):
        """Runs both kinds of blocks, `(E, base, D)` and `(blocks, spill, D)`."""
        copied = [_copied(weight, self.owners) for weight in weights]
        of_base, of_spill = zip(*copied, strict=True)
        return network(inputs[0], *of_base), network(inputs[1], *of_spill)


def chosen_only(counts, weights):
    """The experts that have rows, and their part of every weight.

    Args:
        counts: `(E,)` int32, rows of each expert.
        weights: Tensors or `tf.Variable`s `(E, ...)`. Of a variable only these experts
            are read.

    Returns:
        `(c,)`, rows of the c experts that have some, or of one expert without if none
        has, and a list of tensors `(c, ...)`. The gradients of `weights` through them are
        `tf.IndexedSlices` in which no expert stands twice.
    """
    experts = tf.range(tf.size(counts))
    # The network is called with one expert at least.
    most = tf.argmax(counts, output_type=tf.int32)
    chosen = tf.boolean_mask(experts, (counts > 0) | tf.equal(experts, most))
    return tf.gather(counts, chosen), [tf.gather(w, chosen) for w in weights]


def run_in_blocks(network, counts, x, *weights):
    """Runs experts on `(M, D)` rows sorted by expert."""
    blocks = _Blocks(counts, tf.shape(x)[0])
    outputs = blocks.run(network, _into_blocks(x, blocks), weights)
    return _out_of_blocks(outputs, blocks)


def mix_in_blocks(network, counts, tokens, gates, plan: SortedPlan, *weights):
    """Runs `(N, D)` tokens through their experts and sums the answers.

    Tokens go straight to their slots, and answers from their slots to the sums: the
    sorted rows are never laid side by side. `counts` are the rows of each expert that
    the weights are of.
    """
    blocks = _Blocks(counts, tf.size(plan.token_indices))
    tokens_of = [_at_rows(plan.token_indices, own) for own in blocks.rows]
    slots = tf.gather(blocks.slots, plan.positions)  # (N, K)
    inputs = _tokens_into_blocks(tokens, tokens_of, slots)
    outputs = blocks.run(network, inputs, weights)
    order = plan.assignments_of_rows()
    assignments = [_at_rows(order, own) for own in blocks.rows]
    return _combine_blocks(outputs, gates, blocks, tokens_of, assignments, slots)


def _at_rows(values, rows):
    """Values of the rows in slots, that of row 0 in empty ones."""
    return tf.gather(values, tf.maximum(rows, 0))


def _tokens_into_blocks(tokens, tokens_of, slots):
    @tf.custom_gradient
    def run(x):
        def grad(*dy):
            return tf.reduce_sum(_at_slots(dy, slots), axis=1)

        return tuple(tf.gather(x, own) for own in tokens_of), grad

    return run(tokens)


def _combine_blocks(outputs, gates, blocks, tokens_of, assignments, slots):
    @tf.custom_gradient
    def weighted_sum(gates, *outputs):
        def grad(dy):
            d_gates, d_outputs = [], []
            flat_gates = tf.reshape(gates, [-1])
            own = zip(outputs, tokens_of, assignments, blocks.rows, strict=True)
            for answers, tokens, which, rows in own:
                upstream = tf.gather(dy, tokens)
                d_gates.append(tf.reduce_sum(upstream * answers, axis=-1))
                factors = tf.gather(flat_gates, which)
                factors = tf.where(rows < 0, tf.zeros_like(factors), factors)
                d_outputs.append(upstream * factors[..., tf.newaxis])
            d_gates = tf.concat([tf.reshape(each, [-1]) for each in d_gates], axis=0)
            return tf.gather(d_gates, slots), *d_outputs

        chosen = _at_slots(outputs, slots)  # (N, K, out)
        return tf.reduce_sum(chosen * gates[..., tf.newaxis], axis=1), grad

    return weighted_sum(gates, *outputs)


# What a block costs beside its rows, in rows: reading a kernel where it lies, and
# copying it (and adding its gradient) for a spill block. Measured ratios of the
# time for a row's product are 5 to 10 and 25 to 40; the choice is not sensitive.
_READ_COST = 8
_COPY_COST = 32


def _block_sizes(counts, num_experts):
    """Slots of a base block and of a spill block, of least estimated work."""
    longest = tf.reduce_max(counts)
    mean = tf.cast(tf.reduce_sum(counts), tf.float32) / tf.cast(num_experts, tf.float32)
    shares = tf.constant([0.0, 0.25, 0.5, 0.75, 1.0, 1.125, 1.25, 1.5, 1.75, 2.0, 3.0])
    bases = tf.minimum(tf.cast(tf.math.ceil(mean * shares), tf.int32), longest)
    bases = tf.concat([bases, [longest]], axis=0)  # (S,)
    spills = tf.constant([4, 16, 64, 256])  # (B,)
    rest = tf.maximum(counts - bases[:, tf.newaxis], 0)  # (S, E)
    blocks = tf.reduce_sum(
        -(-rest[:, tf.newaxis, :] // spills[:, tf.newaxis]), axis=-1
    )  # (S, B)
    # In float: the products may be beyond int32.
    work = tf.where(bases > 0, tf.cast(bases + _READ_COST, tf.float32), 0.0)
    work = work[:, tf.newaxis] * tf.cast(num_experts, tf.float32)
    work += tf.cast(blocks, tf.float32) * tf.cast(spills + _COPY_COST, tf.float32)
    best = tf.argmin(tf.reshape(work, [-1]), output_type=tf.int32)
    num_spills = spills.shape[0]
    return tf.gather(bases, best // num_spills), tf.gather(spills, best % num_spills)


def _copied(weight, owners):
    """The weight, and a copy of its part for every spill block.

    The gradient of the copies is added to that of the weight in place: a kernel's
    gradient is written once, and again only where its expert has spill blocks.
    """

    @tf.custom_gradient
    def run(weight):
        def grad(d_base, d_copies):
            # Owners ascend. Their blocks are summed first, so that no index comes
            # twice in the scatter: its result is the same in every run.
            first = tf.concat([[True], owners[1:] != owners[:-1]], axis=0)
            first = first[: tf.size(owners)]  # there may be no owner at all
            segment = tf.cumsum(tf.cast(first, tf.int32)) - 1
            summed = tf.math.segment_sum(d_copies, segment)
            unique = tf.boolean_mask(owners, first)
            return ops.add_at(d_base, unique[:, tf.newaxis], summed)

        return (tf.identity(weight), tf.gather(weight, owners)), grad

    return run(weight)


def _into_blocks(x, blocks):
    """`(M, D)` -> `(E, base, D)` and `(blocks, spill, D)`."""

    @tf.custom_gradient
    def run(x):
        # Empty slots get the first row: nobody reads what becomes of it, and its
        # gradient is zero. An empty batch has no slots.
        results = tuple(_at_rows(x, rows) for rows in blocks.rows)
        return results, lambda *dy: _at_slots(dy, blocks.slots)

    return run(x)


def _out_of_blocks(outputs, blocks):
    """`(E, base, D)` and `(blocks, spill, D)` -> `(M, D)`."""

    @tf.custom_gradient
    def run(*outputs):
        def grad(dy):
            padded = tf.pad(dy, [[1, 0], [0, 0]])
            return tuple(tf.gather(padded, rows + 1) for rows in blocks.rows)

        return _at_slots(outputs, blocks.slots), grad

    return run(*outputs)


def _at_slots(blocks, slots):
    flat = [tf.reshape(each, [-1, each.shape[-1]]) for each in blocks]
    return tf.gather(tf.concat(flat, axis=0), slots)
