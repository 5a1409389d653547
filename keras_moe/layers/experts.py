"""Experts: the networks that the gate chooses among."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks, functional, placement
from keras_moe.layers.initializers import PerExpertInitializer


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForwardExperts(keras.layers.Layer):
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
        ValueError: A size is not positive; `counts` is missing; `gates` come
            without `plan` or the reverse; inputs have no known feature
            dimension, or a first dimension other than `num_experts` for rank 3.

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
        **kwargs: Any,
    ):
        num_experts = checks.verify_positive_int(num_experts, "num_experts")
        units = checks.verify_units(hidden_units, "hidden_units")
        if output_units is not None:
            output_units = checks.verify_positive_int(output_units, "output_units")
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.hidden_units = list(units) if np.ndim(hidden_units) else units[0]
        self.output_units = output_units
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.recompute = bool(recompute)
        # Experts that stay together where experts are sharded over devices.
        self.group_size = 1

    def build(self, input_shape):
        features = self._verify_inputs(input_shape)
        sizes = [features, *checks.verify_units(self.hidden_units, "hidden_units")]
        sizes.append(self.output_units or features)
        self.kernels = []
        self.biases = []
        place = placement.for_weights()
        for i, (size_in, size_out) in enumerate(itertools.pairwise(sizes)):
            self.kernels.append(
                place.add_expert_weight(
                    self,
                    (self.num_experts, size_in, size_out),
                    PerExpertInitializer(self.kernel_initializer),
                    f"kernel_{i}",
                    self.group_size,
                )
            )
            # Optimizers may keep less state for these, see `FactoredAdam`.
            self.kernels[-1].is_expert_weight = True
            if self.use_bias:
                self.biases.append(
                    place.add_expert_weight(
                        self,
                        (self.num_experts, size_out),
                        self.bias_initializer,
                        f"bias_{i}",
                        self.group_size,
                    )
                )

    def _verify_inputs(self, input_shape):
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
        kernels = [tf.convert_to_tensor(kernel) for kernel in self.kernels]
        biases = [tf.convert_to_tensor(bias) for bias in self.biases] or None
        if (plan is None) != (gates is None):
            missing, given = ("gates", "plan") if gates is None else ("plan", "gates")
            raise ValueError(
                f"`{missing}` of {type(self).__name__} must come with `{given}`. "
                f"Received: {missing}=None. Pass both of a `GatingResult`, or neither."
            )
        if plan is None:
            return functional.feed_forward_experts(
                inputs, kernels, biases, counts, self.activation, self.recompute
            )
        return functional.mix_feed_forward_experts(
            inputs, gates, plan, kernels, biases, self.activation, self.recompute
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
            "hidden_units": self.hidden_units,
            "output_units": self.output_units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "recompute": self.recompute,
        }
