"""Experts: the networks that the gate chooses among."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_moe import checks, functional
from keras_moe.layers.base_experts import Experts


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForwardExperts(Experts):
    """A stack of feed-forward networks of one shape, each with its own weights.

    $E_i(x) = \\mathrm{act}(x W_{i,1}) W_{i,2}$, without bias unless asked for,
    as in the paper. Used inside `MoE`; on its own it takes rows that are
    already sorted by expert.

    Args:
        num_experts: Int. Number of experts.
        hidden_units: Int, or one int for each hidden layer.
        output_units: Int or None. Features of the output; None means those of
            the input. Defaults to `None`.
        activation: Activation of the hidden layers. The output is linear.
            Defaults to `"relu"`.
        use_bias: Bool. Whether every layer adds a bias. Defaults to `False`.
        kernel_initializer: Initial value of one expert's kernel; every expert
            gets its own draw, with the fans of a single expert. Defaults to
            `"glorot_uniform"`.
        bias_initializer: Initial value of the biases. Defaults to `"zeros"`.
        kernel_regularizer: Regularizer of one expert's kernel; that of all is the
            sum over the experts. Defaults to `None`.
        bias_regularizer: The same of a bias. Defaults to `None`.
        kernel_constraint: Constraint of one expert's kernel `(in, out)`, by itself
            for every expert. Defaults to `None`.
        bias_constraint: The same of a bias `(out,)`. Defaults to `None`.
        frozen_experts: Indices of experts that are not trained, see `Experts`. May
            be set later, before the model is compiled. Defaults to `()`.
        recompute: Bool. Whether hidden activations are computed again in the
            backward pass instead of being kept (appendix D): same gradients,
            less memory, more operations. Defaults to `False`.
        computation: `"unrolled"`, `"blocks"` or None, see `Experts`. Defaults to
            `None`.

    Call arguments:
        inputs: Float tensor, `(rows, features)` sorted by expert, or
            `(num_experts, capacity, features)`; with a plan `(tokens, features)`.
        counts: int32 tensor `(num_experts,)`: rows of each expert. Needed for
            inputs of rank 2 without a plan.
        gates: Float tensor, the gates that go with the plan.
        plan: A `keras_moe.types.DispatchPlan`, by which the tokens go to their
            experts and the answers are summed, `(tokens, output_units)`.

    Input shape:
        `(rows, features)` or `(num_experts, capacity, features)`.

    Output shape:
        The same with `output_units` in place of `features`.

    Losses and state:
        Weights `kernel_0`, `kernel_1`, ... of shape `(num_experts, in, out)`
        and, with `use_bias`, `bias_0`, ... of shape `(num_experts, out)`.
        Regularization losses, as of any Keras layer, once for the weights of all
        devices.

    Raises:
        ValueError: As for `Experts`.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(2, hidden_units=16)
    >>> rows = np.ones((5, 8), "float32")  # 3 rows of expert 0, 2 of expert 1
    >>> experts(rows, counts=np.array([3, 2])).shape.as_list()
    [5, 8]

    Reference:
        Shazeer et al. 2017, section 2 and appendix C.1.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_units: int | Sequence[int],
        *,
        output_units: int | None = None,
        activation: Any = "relu",
        use_bias: bool = False,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        frozen_experts: Sequence[int] = (),
        recompute: bool = False,
        computation: str | None = None,
        **kwargs: Any,
    ):
        units = checks.verify_units(hidden_units, "hidden_units")
        super().__init__(
            num_experts,
            output_units=output_units,
            recompute=recompute,
            computation=computation,
            frozen_experts=frozen_experts,
            **kwargs,
        )
        self.hidden_units = list(units) if np.ndim(hidden_units) else units[0]
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.kernels: list[Any] = []
        self.biases: list[Any] = []

    def build(self, input_shape):
        features = self.verify_inputs(input_shape)
        sizes = [features, *checks.verify_units(self.hidden_units, "hidden_units")]
        sizes.append(self.output_units or features)
        self.kernels, self.biases = [], []
        for i, shape in enumerate(itertools.pairwise(sizes)):
            self.kernels.append(
                self.add_expert_weight(
                    f"kernel_{i}",
                    shape,
                    self.kernel_initializer,
                    regularizer=self.kernel_regularizer,
                    constraint=self.kernel_constraint,
                )
            )
            if self.use_bias:
                self.biases.append(
                    self.add_expert_weight(
                        f"bias_{i}",
                        shape[1:],
                        self.bias_initializer,
                        regularizer=self.bias_regularizer,
                        constraint=self.bias_constraint,
                    )
                )

    def network(self, rows, *weights):
        step = 2 if self.use_bias else 1  # a bias follows each kernel
        kernels, biases = weights[::step], weights[1::2] if self.use_bias else ()
        run = functional.feed_forward_network(len(kernels), self.activation)
        return run(rows, *kernels, *biases)

    def get_config(self):
        return {
            **super().get_config(),
            "hidden_units": self.hidden_units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }
