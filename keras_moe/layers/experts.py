"""Experts: the networks that the gate chooses among.

`Experts` is the base of experts of one form: their weights are stacked over the experts.
What one of them computes stands in `network`; how rows come to them, on one device or
several, does not.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers.initializers import PerExpertInitializer
from keras_moe.layers.tracking import track_entries


class Experts(checks.FromConfig, keras.layers.Layer):
    """Experts of one form, their weights stacked. The base of `FeedForwardExperts`.

    A subclass makes its weights in `build` with `add_expert_weight` and overrides
    `network`, which says what experts compute from rows and weights. It then runs
    wherever `FeedForwardExperts` do: fused with dispatch and combine, recomputed,
    with a capacity, sharded over several devices.

    Args:
        num_experts: Int. Number of experts.
        output_units: Int or None. Features of the output; None means those of
            the input. Defaults to `None`.
        recompute: Bool. Whether what lies between inputs and outputs is computed
            again in the backward pass instead of being kept (appendix D): same
            gradients, less memory, more operations. Defaults to `False`.
        computation: `"unrolled"`, each expert by itself, `"blocks"`, one batched
            product over padded rows, or None, which chooses by the number of
            experts and the device (`functional.default_computation`). Defaults to
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

    Raises:
        ValueError: A size is not positive; `computation` is unknown; `counts` is
            missing; `gates` come without `plan` or the reverse; inputs have no
            known feature dimension, or a first dimension other than `num_experts`
            for rank 3.

    Example:

    >>> class Scales(keras_moe.layers.Experts):
    ...     def build(self, input_shape):
    ...         self.add_expert_weight("scale", (input_shape[-1],), "ones")
    ...     def network(self, rows, scale):  # (e, rows, features), (e, features)
    ...         return rows * scale[:, None]
    >>> moe = keras_moe.layers.MoE(Scales(8), keras_moe.layers.NoisyTopKGating(2))
    >>> moe(np.ones((3, 4), "float32")).shape.as_list()
    [3, 4]

    Reference:
        Shazeer et al. 2017, section 2.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        output_units: int | None = None,
        recompute: bool = False,
        computation: str | None = None,
        **kwargs: Any,
    ):
        num_experts = checks.verify_positive_int(num_experts, "num_experts")
        if output_units is not None:
            output_units = checks.verify_positive_int(output_units, "output_units")
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.output_units = output_units
        self.recompute = bool(recompute)
        self.computation = functional.verify_computation(computation)
        # Experts that stay together where experts are sharded over devices.
        self.group_size = 1
        self.stacked_weights: list[Any] = []

    def add_expert_weight(
        self, name: str, shape: Sequence[int], initializer: Any = "glorot_uniform"
    ) -> Any:
        """Adds a weight to every expert; to be called in `build`.

        Args:
            name: Name of the weight.
            shape: Shape of one expert's weight. From rank 2 it is a kernel: every
                expert gets its own draw, with the fans of a single expert.
            initializer: Initial value. Defaults to `"glorot_uniform"`.

        Returns:
            The Keras variable `(num_experts, *shape)`. `network` gets all of them
            in the order in which they were added.
        """
        initializer = keras.initializers.get(initializer)
        is_kernel = len(shape) >= 2
        variable = engine.for_weights().weights.add_expert_weight(
            self,
            (self.num_experts, *shape),
            PerExpertInitializer(initializer) if is_kernel else initializer,
            name,
            self.group_size,
        )
        # Optimizers may keep less state for kernels, see `FactoredAdam`.
        variable.is_expert_weight = is_kernel
        self.stacked_weights.append(variable)
        track_entries(self, "stacked_weights")
        return variable

    def network(self, rows: tf.Tensor, *weights: tf.Tensor) -> tf.Tensor:
        """What experts compute, row by row.

        Args:
            rows: `(e, R, features)`: R rows for each of e experts, some or all.
            *weights: The part of every weight that belongs to them, `(e, ...)`.

        Returns:
            `(e, R, output_units)`.
        """
        raise NotImplementedError

    def verify_inputs(self, input_shape: Sequence[int | None]) -> int:
        """Returns the features of inputs, or raises if experts cannot take them."""
        name = type(self).__name__
        features = checks.verify_input_shape(input_shape, name)
        rank = len(input_shape)
        if rank > 3 or (rank == 3 and input_shape[0] not in (self.num_experts, None)):
            raise ValueError(
                f"`inputs` of {name} must be (rows, features) sorted by expert, or "
                f"(num_experts, capacity, features). Received: "
                f"shape={tuple(input_shape)}, num_experts={self.num_experts}. "
                "Wrap the experts in `MoE`, which sorts the tokens."
            )
        return features

    def call(self, inputs, counts=None, gates=None, plan=None):
        if (plan is None) != (gates is None):
            missing, given = ("gates", "plan") if gates is None else ("plan", "gates")
            raise ValueError(
                f"`{missing}` of {type(self).__name__} must come with `{given}`. "
                f"Received: {missing}=None. Pass both, or neither."
            )
        weights = [tf.convert_to_tensor(weight) for weight in self.stacked_weights]
        if plan is None:
            return functional.run_experts(
                self.network,
                inputs,
                weights,
                counts,
                recompute=self.recompute,
                computation=self.computation,
            )
        return functional.mix_experts(
            self.network,
            inputs,
            gates,
            plan,
            weights,
            recompute=self.recompute,
            computation=self.computation,
        )

    def get_build_config(self):
        # A file builds experts before the layer around them, which sets this.
        config = super().get_build_config() or {}  # None before it is built
        return {**config, "group_size": self.group_size} if config else None

    def build_from_config(self, config):
        self.group_size = (config or {}).get("group_size", 1)
        super().build_from_config(config)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.output_units or input_shape[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "output_units": self.output_units,
            "recompute": self.recompute,
            "computation": self.computation,
        }


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
        recompute: bool = False,
        computation: str | None = None,
        **kwargs: Any,
    ):
        checks.verify_units(hidden_units, "hidden_units")
        super().__init__(
            num_experts,
            output_units=output_units,
            recompute=recompute,
            computation=computation,
            **kwargs,
        )
        self.hidden_units = hidden_units
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape):
        features = self.verify_inputs(input_shape)
        sizes = [features, *checks.verify_units(self.hidden_units, "hidden_units")]
        sizes.append(self.output_units or features)
        self.kernels, self.biases = [], []
        for i, shape in enumerate(itertools.pairwise(sizes)):
            self.kernels.append(
                self.add_expert_weight(f"kernel_{i}", shape, self.kernel_initializer)
            )
            if self.use_bias:
                self.biases.append(
                    self.add_expert_weight(
                        f"bias_{i}", shape[1:], self.bias_initializer
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
        }
