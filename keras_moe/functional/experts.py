"""The experts' matrix products: the hot path.

Expert inputs come either as `(M, D)` rows sorted by expert with the number of
rows of each expert (dropless), or as `(E, C, D)` with the same number of slots
for every expert (static shapes). There are three ways to compute them:

* static: one batched product over `(E, C, D)`;
* expert by expert, for up to `MOST_UNROLLED_EXPERTS` experts: one plain product
  for each, no padding; the graph grows with E;
* blocks, for more experts: rows are padded into blocks of one expert each and
  multiplied in one batched product; the graph does not grow with E, and weight
  gradients are written once.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

Activation = Callable[[tf.Tensor], tf.Tensor]

# Up to here a product for each expert is at least as fast as padded blocks; from
# here on the number of operations and the stacking of weight gradients cost more
# than padding does.
MOST_UNROLLED_EXPERTS = 128


def feed_forward_experts(
    expert_inputs: tf.Tensor,
    kernels: Sequence[tf.Tensor],
    biases: Sequence[tf.Tensor] | None = None,
    counts: tf.Tensor | None = None,
    activation: Activation = tf.nn.relu,
    recompute: bool = False,
) -> tf.Tensor:
    """Runs E feed-forward networks, each on its own rows.

    $E_i(x) = \\mathrm{act}(\\cdots \\mathrm{act}(x W_{i,1}) \\cdots) W_{i,L}$

    The activation follows every kernel but the last.

    Args:
        expert_inputs: `(M, D)` sorted by expert, or `(E, C, D)`.
        kernels: L tensors `(E, in, out)`; the first `in` is D.
        biases: L tensors `(E, out)`, or None for no bias (the paper).
        counts: `(E,)` int32, rows of each expert, with sum M. Needed for
            `(M, D)`, not used for `(E, C, D)`.
        activation: Function of a tensor, element by element.
        recompute: Whether hidden activations are computed again in the backward
            pass instead of being kept (appendix D): same gradients, less
            memory, about a third more operations. Up to
            `MOST_UNROLLED_EXPERTS` experts the backward pass holds those of one
            expert at a time; otherwise those of all experts of one layer.

    Returns:
        `(M, out)` or `(E, C, out)`. An expert without rows costs nothing.

    Raises:
        ValueError: `counts` is missing for `(M, D)`.

    Reference:
        Shazeer et al. 2017, section 2 and appendix C.1.
    """
    if expert_inputs.shape.rank == 2 and counts is None:
        raise ValueError(
            "`counts` is needed for expert inputs of rank 2, to know which rows are "
            f"whose. Received: expert_inputs.shape={expert_inputs.shape}, counts=None."
        )
    num_kernels = len(kernels)

    def network(x, *weights):
        """All layers on `x`, with the weights of one expert or of a batch."""
        last = num_kernels - 1
        for i in range(num_kernels):
            x = tf.matmul(x, weights[i])
            if len(weights) > num_kernels:
                bias = weights[num_kernels + i]
                x = x + (bias if bias.shape.rank == 1 else bias[:, tf.newaxis, :])
            if i < last:
                x = activation(x)
        return x

    weights = [*kernels, *(biases or ())]
    if expert_inputs.shape.rank == 3:
        run = _recomputed(network) if recompute else network
        return run(expert_inputs, *weights)
    if weights[0].shape[0] <= MOST_UNROLLED_EXPERTS:
        run = _one_by_one_recomputed if recompute else _one_by_one
        return run(network, counts, expert_inputs, *weights)
    run = _recomputed(network) if recompute else network
    return _in_blocks(run, counts, expert_inputs, *weights)


def _recomputed(function):
    """`function`, of which only the arguments are kept for the backward pass.

    `tf.recompute_grad` would add a zero to every argument, so it would copy all
    the weights; here only the inputs depend on the incoming gradient.
    """

    @tf.custom_gradient
    def run(x, *weights):
        def grad(dy):
            # The dependency keeps the graph optimizer from taking the values of
            # the forward pass, which would have to be kept for it.
            with tf.control_dependencies([dy]):
                inputs = tf.identity(x)
            with tf.GradientTape() as tape:
                tape.watch([inputs, *weights])
                outputs = function(inputs, *weights)
            return tape.gradient(
                outputs, [inputs, *weights], dy, unconnected_gradients="zero"
            )

        return function(x, *weights), grad

    return run


def _split_by_expert(counts, x, weights):
    """For each expert its rows of `x` and its own weights. Memory is shared."""
    num_experts = weights[0].shape[0]
    rows = [x] if num_experts == 1 else tf.split(x, counts, num=num_experts)
    own_weights = zip(*(tf.unstack(weight) for weight in weights), strict=True)
    return zip(rows, own_weights, strict=True)


def _concat(parts):
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


def _one_by_one(network, counts, x, *weights):
    """Split, run each expert on its rows, concatenate.

    Splitting along the first axis shares memory, and so does taking one
    expert's kernel from the stack, so only inputs and outputs are copied.
    """
    return _concat(
        [network(rows, *own) for rows, own in _split_by_expert(counts, x, weights)]
    )


def _one_by_one_recomputed(network, counts, x, *weights):
    """`_one_by_one`; the backward pass holds the activations of one expert."""

    @tf.custom_gradient
    def run(x, *weights):
        def grad(dy):
            outer = tf.split(dy, counts) if weights[0].shape[0] > 1 else [dy]
            gradients = []
            before = [dy]
            for (rows, own), d_rows in zip(
                _split_by_expert(counts, x, weights), outer, strict=True
            ):
                # An expert waits for the gradients of the one before it.
                with tf.control_dependencies(before):
                    inputs = [tf.identity(each) for each in (rows, *own)]
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    outputs = network(*inputs)
                before = tape.gradient(outputs, inputs, d_rows)
                gradients.append(before)
            d_x, *d_weights = zip(*gradients, strict=True)
            return [_concat(list(d_x)), *(tf.stack(each) for each in d_weights)]

        return _one_by_one(network, counts, x, *weights), grad

    return run(x, *weights)


def _in_blocks(network, counts, x, *weights):
    """Pads the rows into blocks of one expert each, for one batched product.

    If experts have similar numbers of rows, a block is as long as the busiest
    expert and block e is that of expert e, so kernels are used where they lie.
    Otherwise (skewed routing, or few tokens and many experts) blocks are short,
    a busy expert has several, an idle one has none, and each block gets a copy
    of its kernel. Either way the padded rows are at most about twice the rows
    and the copied kernels at most about as many as there are experts.
    """
    num_experts = weights[0].shape[0]
    num_rows = tf.shape(x)[0]
    counts = tf.cast(counts, tf.int32)
    longest = tf.maximum(tf.reduce_max(counts), 1)
    # In float: the product may be beyond int32.
    in_place = tf.cast(longest, tf.float32) * num_experts <= 2.0 * tf.cast(
        num_rows, tf.float32
    )
    short = tf.minimum(longest, tf.maximum(2 * num_rows // num_experts, 1))
    size = tf.where(in_place, longest, short)
    blocks = tf.where(in_place, tf.ones_like(counts), -(-counts // size))
    owners = tf.repeat(tf.range(num_experts), blocks)  # (blocks,) expert of each
    starts = tf.cumsum(counts, exclusive=True)
    first_blocks = tf.cumsum(blocks, exclusive=True)
    # Row of every slot of every block, -1 where a slot is empty.
    rank = (tf.range(tf.size(owners)) - tf.gather(first_blocks, owners)) * size
    rank = rank[:, tf.newaxis] + tf.range(size)
    filled = rank < tf.gather(counts, owners)[:, tf.newaxis]
    rows = tf.where(filled, tf.gather(starts, owners)[:, tf.newaxis] + rank, -1)
    # Slot of every row.
    row_owners = tf.repeat(tf.range(num_experts), counts)
    row_rank = tf.range(num_rows) - tf.gather(starts, row_owners)
    slots = (
        tf.gather(first_blocks, row_owners) + row_rank // size
    ) * size + row_rank % size

    @tf.custom_gradient
    def of_blocks(weight):
        def grad(dy):
            # A dense sum: written once where blocks lie as the kernels do. The
            # shape is set in Python only: after tf.ensure_shape the graph
            # optimizer takes the number of blocks for that of experts.
            summed = tf.cond(
                in_place,
                lambda: dy,
                lambda: tf.math.unsorted_segment_sum(dy, owners, num_experts),
            )
            summed.set_shape(weight.shape)
            return summed

        blocks = tf.cond(in_place, lambda: weight, lambda: tf.gather(weight, owners))
        return blocks, grad

    padded = network(
        _into_blocks(x, rows, slots), *(of_blocks(weight) for weight in weights)
    )
    return _out_of_blocks(padded, rows, slots)


def _into_blocks(x, rows, slots):
    """`(M, D) -> (blocks, size, D)`; the gradient is a gather as well."""

    @tf.custom_gradient
    def run(x):
        return _rows_or_zero(x, rows), lambda dy: _rows_at(dy, slots)

    return run(x)


def _out_of_blocks(x, rows, slots):
    """`(blocks, size, D) -> (M, D)`; the gradient is a gather as well."""

    @tf.custom_gradient
    def run(x):
        return _rows_at(x, slots), lambda dy: _rows_or_zero(dy, rows)

    return run(x)


def _rows_at(blocks, slots):
    return tf.gather(tf.reshape(blocks, [-1, blocks.shape[-1]]), slots)


def _rows_or_zero(x, rows):
    return tf.gather(tf.pad(x, [[1, 0], [0, 0]]), rows + 1)
