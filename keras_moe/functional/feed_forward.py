"""Feed-forward experts, the paper's: `run_experts` and `mix_experts` with their network."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_moe.functional.expert_dropout import drop
from keras_moe.functional.experts import mix_experts, run_experts
from keras_moe.functional.kernels import product
from keras_moe.functional.recomputation import Network
from keras_moe.types import DispatchPlan

Activation = Callable[[tf.Tensor], tf.Tensor]


def feed_forward_experts(
    expert_inputs: tf.Tensor,
    kernels: Sequence[tf.Tensor],
    biases: Sequence[tf.Tensor] | None = None,
    counts: tf.Tensor | None = None,
    activation: Activation = tf.nn.relu,
    recompute: bool = False,
    computation: str | None = None,
) -> tf.Tensor:
    """`run_experts` for feed-forward networks.

    $E_i(x) = \\mathrm{act}(\\cdots \\mathrm{act}(x W_{i,1}) \\cdots) W_{i,L}$

    The activation follows every kernel but the last.

    Args:
        expert_inputs: `(M, D)` sorted by expert, or `(E, C, D)`.
        kernels: L tensors `(E, in, out)`; the first `in` is D.
        biases: L tensors `(E, out)`, or None for no bias (the paper).
        counts: `(E,)` int32, rows of each expert, with sum M. Needed for
            `(M, D)`, not used for `(E, C, D)`.
        activation: Function of a tensor, element by element.
        recompute: As for `run_experts`.
        computation: As for `run_experts`.

    Returns:
        `(M, out)` or `(E, C, out)`. An expert without rows costs nothing.

    Raises:
        ValueError: `counts` is missing for `(M, D)`, or `computation` is unknown.

    Reference:
        Shazeer et al. 2017, section 2 and appendix C.1.
    """
    return run_experts(
        feed_forward_network(len(kernels), activation),
        expert_inputs,
        [*kernels, *(biases or ())],
        counts,
        recompute=recompute,
        computation=computation,
    )


def mix_feed_forward_experts(
    inputs: tf.Tensor,
    gates: tf.Tensor,
    plan: DispatchPlan,
    kernels: Sequence[tf.Tensor],
    biases: Sequence[tf.Tensor] | None = None,
    activation: Activation = tf.nn.relu,
    recompute: bool = False,
    computation: str | None = None,
) -> tf.Tensor:
    """`mix_experts` for feed-forward networks.

    Args:
        inputs: `(N, D)`, the tokens.
        gates: Float, shape of `plan.positions`.
        plan: From `make_dispatch_plan` or `make_capacity_plan`.
        kernels: L tensors `(E, in, out)`; the first `in` is D.
        biases: L tensors `(E, out)`, or None for no bias (the paper).
        activation: Function of a tensor, element by element.
        recompute: As for `run_experts`.
        computation: As for `run_experts`.

    Returns:
        `(N, out)`. Zero for a token without expert. The same in every run.

    Raises:
        ValueError: `computation` is unknown.

    Reference:
        Shazeer et al. 2017, equation 1.
    """
    return mix_experts(
        feed_forward_network(len(kernels), activation),
        inputs,
        gates,
        plan,
        [*kernels, *(biases or ())],
        recompute=recompute,
        computation=computation,
    )


def feed_forward_network(num_kernels: int, activation: Activation) -> Network:
    """The network of a feed-forward expert, for `run_experts` and `mix_experts`.

    Args:
        num_kernels: L, the number of its kernels.
        activation: Function of a tensor; it follows every kernel but the last.

    Returns:
        `network(rows, *weights)`, which takes L kernels and none or L biases.
    """

    def network(x, *weights):
        *hidden, last = _products(weights, num_kernels)
        for layer in hidden:
            x = drop(activation(layer(x)))
        return last(x)

    return taking_one(network)


def gated_network(activation: Activation) -> Network:
    """The network of a gated linear unit (GLU), for `run_experts` and `mix_experts`.

    $E_i(x) = (\\mathrm{act}(x A_i) \\odot x B_i) C_i$

    Args:
        activation: Function of a tensor; it follows the first kernel.

    Returns:
        `network(rows, *weights)`, which takes the kernels A and B, `(E, D, H)`, and
        C, `(E, H, out)`, and none or three biases.

    Reference:
        Shazeer 2020, "GLU Variants Improve Transformer", equations 5 and 6.
    """

    def network(x, *weights):
        activated, linear, output = _products(weights, 3)
        return output(drop(activation(activated(x)) * linear(x)))

    return taking_one(network)


def taking_one(network: Network) -> Network:
    """A network that takes `(R, D)` and the weights of one expert, too; marks it so."""

    def run(rows, *weights):
        return network(rows, *weights)

    run.takes_one = True  # type: ignore[attr-defined]
    return run


def _products(weights, num_kernels):
    """For each kernel what multiplies rows with it, and adds its bias."""

    def layer(i):
        def run(x):
            x = product(x, weights[i])
            if len(weights) > num_kernels:
                x = x + weights[num_kernels + i][..., tf.newaxis, :]
            return x

        return run

    return [layer(i) for i in range(num_kernels)]
