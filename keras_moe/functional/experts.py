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
            memory, about a third more operations.

    Returns:
        `(M, out)` or `(E, C, out)`. An expert without rows costs nothing.

    Raises:
        ValueError: `counts` is missing for `(M, D)`.

    Reference:
        Shazeer et al. 2017, section 2 and appendix C.1.
    """
    num_kernels = len(kernels)

    def run(x, *weights):
        own_biases = weights[num_kernels:] or None
        if x.shape.rank == 3:
            return _static(x, weights[:num_kernels], own_biases, activation)
        compute = (
            _expert_by_expert
            if weights[0].shape[0] <= MOST_UNROLLED_EXPERTS
            else _in_blocks
        )
        return compute(x, weights[:num_kernels], own_biases, counts, activation)

    if expert_inputs.shape.rank == 2 and counts is None:
        raise ValueError(
            "`counts` is needed for expert inputs of rank 2, to know which rows are "
            f"whose. Received: expert_inputs.shape={expert_inputs.shape}, counts=None."
        )
    if recompute:
        run = _recomputed(run)
    return run(expert_inputs, *kernels, *(biases or ()))


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


def _static(x, kernels, biases, activation):
    last = len(kernels) - 1
    for i, kernel in enumerate(kernels):
        x = tf.matmul(x, kernel)  # (E, C, in) @ (E, in, out)
        if biases is not None:
            x = x + biases[i][:, tf.newaxis, :]
        if i < last:
            x = activation(x)
    return x


def _expert_by_expert(x, kernels, biases, counts, activation):
    """Split, one plain matrix product for each expert, concatenate.

    Splitting along the first axis shares memory, and so does taking one
    expert's kernel from the stack, so only inputs and outputs are copied.
    """
    num_experts = kernels[0].shape[0]
    parts = [x] if num_experts == 1 else tf.split(x, counts, num=num_experts)
    kernels_by_expert = zip(*(tf.unstack(kernel) for kernel in kernels), strict=True)
    biases_by_expert = (
        zip(*(tf.unstack(bias) for bias in biases), strict=True)
        if biases is not None
        else [None] * num_experts
    )
    outputs = []
    for part, own_kernels, own_biases in zip(
        parts, kernels_by_expert, biases_by_expert, strict=True
    ):
        for i, kernel in enumerate(own_kernels):
            part = tf.matmul(part, kernel)
            if own_biases is not None:
                part = part + own_biases[i]
            if i < len(own_kernels) - 1:
                part = activation(part)
        outputs.append(part)
    return outputs[0] if num_experts == 1 else tf.concat(outputs, axis=0)


def _in_blocks(x, kernels, biases, counts, activation):
    """Pads the rows into blocks of one expert each, for one batched product.

    If experts have similar numbers of rows, a block is as long as the busiest
    expert and block e is that of expert e, so kernels are used where they lie.
    Otherwise (skewed routing, or few tokens and many experts) blocks are short,
    a busy expert has several, an idle one has none, and each block gets a copy
    of its kernel. Either way the padded rows are at most about twice the rows
    and the copied kernels at most about as many as there are experts.
    """
    num_experts = kernels[0].shape[0]
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

    def of_blocks(weight):
        return tf.cond(in_place, lambda: weight, lambda: tf.gather(weight, owners))

    padded = _static(
        _into_blocks(x, rows, slots),
        [of_blocks(kernel) for kernel in kernels],
        None if biases is None else [of_blocks(bias) for bias in biases],
        activation,
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
