"""Experts: the networks that the gate chooses among."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_moe import checks, functional
from keras_moe.layers.dropping_experts import DroppingExperts


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForwardExperts(DroppingExperts):
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
        computation: `"unrolled"`, `"blocks"`, `"chosen"` or None, see `Experts`.
            Defaults to `None`.
        dropout: Float. Share of the hidden units that are dropped in training; the
            others are scaled up. On several devices, recomputed, and with a capacity
            the same are dropped. Defaults to `0.0`.
        seed: Int or None. Seed of `dropout`. Defaults to `None`.
        lora_rank: Int or None. Rank of low-rank additions to the kernels, which are
            then not trained, as by `enable_lora`. Defaults to `None`.
        lora_alpha: Float or None. The additions are multiplied by `lora_alpha /
            lora_rank`. None means `lora_rank`. Defaults to `None`.

    Call arguments:
        inputs: Float tensor, `(rows, features)` sorted by expert, or
            `(num_experts, capacity, features)`; with a plan `(tokens, features)`.
        counts: int32 tensor `(num_experts,)`: rows of each expert. Needed for
            inputs of rank 2 without a plan.
        gates: Float tensor, the gates that go with the plan.
        plan: A `keras_moe.types.DispatchPlan`, by which the tokens go to their
            experts and the answers are summed, `(tokens, output_units)`.
        training: Bool. Whether hidden units are dropped.

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
        dropout: float = 0.0,
        seed: int | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        **kwargs: Any,
    ):
        units = checks.verify_units(hidden_units, "hidden_units")
        super().__init__(
            num_experts,
            output_units=output_units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            frozen_experts=frozen_experts,
            recompute=recompute,
            computation=computation,
            dropout=dropout,
            seed=seed,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            **kwargs,
        )
        self.hidden_units = list(units) if np.ndim(hidden_units) else units[0]

    def build(self, input_shape):
        features = self.verify_inputs(input_shape)
        sizes = [features, *checks.verify_units(self.hidden_units, "hidden_units")]
        sizes.append(self.output_units or features)
        shapes = itertools.pairwise(sizes)
        self.add_kernels({f"kernel_{i}": shape for i, shape in enumerate(shapes)})

    @property
    def num_dropped_units(self) -> int:
        """Hidden units of one expert, of all hidden layers."""
        return sum(checks.verify_units(self.hidden_units, "hidden_units"))

    def network(self, rows, *weights):
        run = functional.feed_forward_network(len(self.kernels), self.activation)
        return run(rows, *self.kernels_first(weights))

    network.takes_kernels = True  # type: ignore[attr-defined]

    def get_config(self):
        return {**super().get_config(), "hidden_units": self.hidden_units}


@keras.saving.register_keras_serializable(package="keras_moe")
class GatedExperts(DroppingExperts):
    """A stack of gated linear units (GLU) of one shape, each with its own weights.

    $E_i(x) = (\\mathrm{act}(x A_i) \\odot x B_i) C_i$, without bias unless asked for:
    SwiGLU with the default activation, GEGLU with `"gelu"`, ReGLU with `"relu"`, GLU
    with `"sigmoid"`, and bilinear with `"linear"`. Three kernels instead of two: with
    two thirds of the hidden units an expert has as many parameters and operations as
    one of `FeedForwardExperts`. Used inside `MoE`; on its own it takes rows that are
    already sorted by expert.

    Args:
        num_experts: Int. Number of experts.
        hidden_units: Int. Columns of A and B.
        output_units: Int or None. Features of the output; None means those of
            the input. Defaults to `None`.
        activation: Activation of the first product. Defaults to `"silu"`.
        use_bias: Bool. Whether every product adds a bias. Defaults to `False`.
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
            backward pass instead of being kept, see `FeedForwardExperts`. Defaults
            to `False`.
        computation: `"unrolled"`, `"blocks"`, `"chosen"` or None, see `Experts`.
            Defaults to `None`.
        dropout: Float. Share of the hidden units that are dropped in training; the
            others are scaled up. On several devices, recomputed, and with a capacity
            the same are dropped. Defaults to `0.0`.
        seed: Int or None. Seed of `dropout`. Defaults to `None`.
        lora_rank: Int or None. Rank of low-rank additions to the kernels, which are
            then not trained, as by `enable_lora`. Defaults to `None`.
        lora_alpha: Float or None. The additions are multiplied by `lora_alpha /
            lora_rank`. None means `lora_rank`. Defaults to `None`.

    Call arguments:
        inputs: Float tensor, `(rows, features)` sorted by expert, or
            `(num_experts, capacity, features)`; with a plan `(tokens, features)`.
        counts: int32 tensor `(num_experts,)`: rows of each expert. Needed for
            inputs of rank 2 without a plan.
        gates: Float tensor, the gates that go with the plan.
        plan: A `keras_moe.types.DispatchPlan`, by which the tokens go to their
            experts and the answers are summed, `(tokens, output_units)`.
        training: Bool. Whether hidden units are dropped.

    Input shape:
        `(rows, features)` or `(num_experts, capacity, features)`.

    Output shape:
        The same with `output_units` in place of `features`.

    Losses and state:
        Weights `activated_kernel` (A) and `linear_kernel` (B), `(num_experts,
        features, hidden_units)`, and `output_kernel` (C), `(num_experts,
        hidden_units, output_units)`; with `use_bias` `activated_bias` and so on,
        each behind its kernel. Losses of regularizers as of `FeedForwardExperts`.

    Raises:
        ValueError: As for `Experts`.

    Example:

    >>> experts = keras_moe.layers.GatedExperts(8, hidden_units=16)  # SwiGLU
    >>> layer = keras_moe.layers.MoE(experts, keras_moe.layers.NoisyTopKGating(k=2))
    >>> layer(np.ones((5, 12), "float32")).shape.as_list()
    [5, 12]

    Reference:
        Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202, equations
        5 and 6.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_units: int,
        *,
        output_units: int | None = None,
        activation: Any = "silu",
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
        dropout: float = 0.0,
        seed: int | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        **kwargs: Any,
    ):
        hidden_units = checks.verify_positive_int(hidden_units, "hidden_units")
        super().__init__(
            num_experts,
            output_units=output_units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            frozen_experts=frozen_experts,
            recompute=recompute,
            computation=computation,
            dropout=dropout,
            seed=seed,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            **kwargs,
        )
        self.hidden_units = hidden_units

    def build(self, input_shape):
        features, hidden = self.verify_inputs(input_shape), self.hidden_units
        self.add_kernels(
            {
                "activated_kernel": (features, hidden),
                "linear_kernel": (features, hidden),
                "output_kernel": (hidden, self.output_units or features),
            }
        )

    @property
    def num_dropped_units(self) -> int:
        """Hidden units of one expert."""
        return self.hidden_units

    def network(self, rows, *weights):
        run = functional.gated_network(self.activation)
        return run(rows, *self.kernels_first(weights))

    network.takes_kernels = True  # type: ignore[attr-defined]

    def get_config(self):
        return {**super().get_config(), "hidden_units": self.hidden_units}
