"""The experts' matrix products: the hot path.

Expert inputs come either as `(M, D)` rows sorted by expert with the number of
rows of each expert (dropless), or as `(E, C, D)` with the same number of slots
for every expert (static shapes). There are three ways to compute them:

* static: one batched product over `(E, C, D)`;
* expert by expert, for up to `MOST_UNROLLED_EXPERTS` experts: one plain product
  for each, no padding; the graph grows with E;
* blocks, for more experts: rows are padded into one block for each expert and
  multiplied in one batched product; what exceeds a block spills into further ones.
  The graph does not grow with E, and weight gradients are written once.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_moe import checks
from keras_moe.functional.blocks import run_in_blocks

Activation = Callable[[tf.Tensor], tf.Tensor]

# Up to here a product for each expert is at least as fast as padded blocks, and the
# graph is traced in seconds; beyond, its size and the stacking of weight gradients
# cost more than padding does.
MOST_UNROLLED_EXPERTS = 256


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
    num_experts = kernels[0].shape[0]
    network = network_of(len(kernels), activation)
    weights = [*kernels, *(biases or ())]
    if expert_inputs.shape.rank == 3:
        shape = [num_experts, None, None]
        checks.verify_shape(shape, "slots of each expert", expert_inputs=expert_inputs)
        run = recomputed(network) if recompute else network
        return run(expert_inputs, *weights)
    counts = checks.verify_counts(counts, num_experts, expert_inputs)
    if num_experts == 0:  # no experts live on this device: no rows either
        nothing = network(expert_inputs[tf.newaxis], *map(_no_expert, weights))
        return nothing[0]
    if num_experts <= MOST_UNROLLED_EXPERTS:
        if recompute:
            return _one_by_one_recomputed(network, counts, expert_inputs, *weights)
        return _one_by_one(expert_inputs, kernels, biases, counts, activation)
    run = recomputed(network) if recompute else network
    return run_in_blocks(run, counts, expert_inputs, *weights)


def network_of(num_kernels, activation):
    """A function that runs experts on `(E, rows, D)` with their kernels and biases."""

    def network(x, *weights):
        last = num_kernels - 1
        for i in range(num_kernels):
            x = tf.matmul(x, weights[i])
            if len(weights) > num_kernels:
                x = x + weights[num_kernels + i][:, tf.newaxis, :]
            if i < last:
                x = activation(x)
        return x

    return network


def _no_expert(weight):
    """`(0, ...)` -> `(1, ...)` of zeros, whose gradient goes nowhere."""
    return tf.reduce_sum(weight, axis=0, keepdims=True)


def recomputed(function):
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


def split_by_expert(x, counts, num_experts):
    """For each expert its rows of `x`, which share its memory."""
    return [x] if num_experts == 1 else tf.split(x, counts, num=num_experts)


def _concat(parts):
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


def _one_by_one(x, kernels, biases, counts, activation):
    """Split, run each expert on its rows, concatenate.

    Splitting along the first axis shares memory, and so does taking one
    expert's kernel from the stack, so only inputs and outputs are copied.
    """
    parts = split_by_expert(x, counts, kernels[0].shape[0])
    return _concat(run_one_by_one(parts, kernels, biases, activation))


def run_one_by_one(parts, kernels, biases, activation):
    """Each expert's network on its own rows, one part for each expert."""
    for i, kernel in enumerate(kernels):
        parts = products(kernel, parts)
        if biases:
            own = tf.unstack(biases[i])
            parts = [part + bias for part, bias in zip(parts, own, strict=True)]
        if i < len(kernels) - 1:
            parts = [activation(part) for part in parts]
    return parts


def products(kernels, parts):
    """Each part times its kernel, with one gradient for all of them.

    The gradient with regard to the rows is taken as a batched product of one
    element: on CPU the plain product with a transposed kernel repacks it and takes
    1.4 (512 rows) to 2.3 times (64 rows) as long.
    """

    @tf.custom_gradient
    def run(kernels, *parts):
        def grad(*upstream):
            dys = [tf.convert_to_tensor(dy) for dy in upstream]  # no slices
            d_kernels = [
                tf.matmul(part, dy, transpose_a=True)
                for part, dy in zip(parts, dys, strict=True)
            ]
            d_parts = [
                tf.matmul(dy[tf.newaxis], kernel, transpose_b=True)[0]
                for dy, kernel in zip(dys, tf.split(kernels, len(parts)), strict=True)
            ]
            return tf.stack(d_kernels), *d_parts

        own = tf.unstack(kernels)
        return tuple(tf.matmul(*pair) for pair in zip(parts, own, strict=True)), grad

    return list(run(kernels, *parts))


def _one_by_one_recomputed(network, counts, x, *weights):
    """`_one_by_one`; the backward pass holds the activations of one expert."""
    num_experts = weights[0].shape[0]

    def arguments(x, *weights):
        """For each expert `(1, rows, D)` and its weights, as a batch of one."""
        rows = [part[tf.newaxis] for part in split_by_expert(x, counts, num_experts)]
        return list(
            zip(rows, *(tf.split(w, num_experts) for w in weights), strict=True)
        )

    @tf.custom_gradient
    def run(x, *weights):
        def grad(dy):
            gradients = []
            before = [dy]
            upstream = split_by_expert(dy, counts, num_experts)
            for own, d_rows in zip(arguments(x, *weights), upstream, strict=True):
                # An expert waits for the gradients of the one before it.
                with tf.control_dependencies(before):
                    inputs = [tf.identity(each) for each in own]
                with tf.GradientTape() as tape:
                    tape.watch(inputs)
                    outputs = network(*inputs)
                before = tape.gradient(outputs, inputs, d_rows[tf.newaxis])
                gradients.append(before)
            d_x, *d_weights = zip(*gradients, strict=True)
            return _concat([each[0] for each in d_x]), *(
                _concat(list(each)) for each in d_weights
            )

        outputs = [network(*own)[0] for own in arguments(x, *weights)]
        return _concat(outputs), grad

    return run(x, *weights)
