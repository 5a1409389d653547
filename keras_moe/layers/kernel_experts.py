"""What experts that are made of products with kernels share: rules, biases, config."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe.layers.base_experts import Experts


class KernelExperts(Experts):
    """Experts whose weights are kernels, with or without biases.

    The base of `FeedForwardExperts` and `GatedExperts`, which say which kernels there
    are and what is computed with them. Arguments are documented there.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        output_units: int | None,
        activation: Any,
        use_bias: bool,
        kernel_initializer: Any,
        bias_initializer: Any,
        kernel_regularizer: Any,
        bias_regularizer: Any,
        kernel_constraint: Any,
        bias_constraint: Any,
        frozen_experts: Sequence[int],
        recompute: bool,
        computation: str | None,
        **kwargs: Any,
    ):
        super().__init__(
            num_experts,
            output_units=output_units,
            recompute=recompute,
            computation=computation,
            frozen_experts=frozen_experts,
            **kwargs,
        )
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

    def add_kernels(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Adds kernels, each followed by its bias; to be called in `build`, once.

        Args:
            shapes: Shape of one expert's kernel, `(in, out)`, for each name, such as
                `kernel_0` or `output_kernel`: its bias is `bias_0` or `output_bias`.
        """
        self.kernels, self.biases = [], []
        for name, shape in shapes.items():
            self.kernels.append(
                self.add_expert_weight(
                    name,
                    shape,
                    self.kernel_initializer,
                    regularizer=self.kernel_regularizer,
                    constraint=self.kernel_constraint,
                )
            )
            if self.use_bias:
                self.biases.append(
                    self.add_expert_weight(
                        name.replace("kernel", "bias"),
                        shape[1:],
                        self.bias_initializer,
                        regularizer=self.bias_regularizer,
                        constraint=self.bias_constraint,
                    )
                )

    def kernels_first(self, weights: Sequence) -> tuple:
        """The weights that `network` gets, all kernels before all biases."""
        step = 2 if self.use_bias else 1  # a bias follows each kernel
        return (*weights[::step], *(weights[1::2] if self.use_bias else ()))

    def get_config(self):
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }
