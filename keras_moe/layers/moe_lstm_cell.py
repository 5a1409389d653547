"""One step of an LSTM with a mixture of experts inside (section 3.1)."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers import configs
from keras_moe.layers.causality import verify_causal
from keras_moe.layers.gate_contract import (
    default_gating,
    share_num_experts,
    verify_recurrent_gate,
    warn_of_constant_gates,
)
from keras_moe.layers.gating import k_of
from keras_moe.layers.initializers import PerExpertInitializer


class Matrices:
    """The matrices of a cell as experts without bias, as a dispatcher takes them.

    Args:
        cell: The built `MoELSTMCell`.
    """

    def __init__(self, cell: "MoELSTMCell"):
        self.num_experts = cell.num_experts
        self.compute_dtype = cell.compute_dtype
        self.stacked_weights = [cell.kernel]

    def values(self, rows: tf.Tensor) -> list[tf.Tensor]:
        """The weights, for rows of any number."""
        return [tf.convert_to_tensor(weight) for weight in self.stacked_weights]

    def compute(self, rows: tf.Tensor, kernels: tf.Tensor) -> tf.Tensor:
        """`(E, rows, D)` -> `(E, rows, 4 * units)`."""
        return tf.matmul(rows, kernels)

    def call(self, rows: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        """`(rows, D)` sorted by expert -> `(rows, 4 * units)`."""
        return functional.feed_forward_experts(rows, self.values(rows), counts=counts)

    __call__ = call


@keras.saving.register_keras_serializable(package="keras_moe")
class MoELSTMCell(keras.layers.Layer):
    """One step of an LSTM whose weight matrix is a mixture of experts.

    With $u = [x_t, h_{t-1}]$ the pre-activations are
    $z = \\sum_i G(u)_i \\, u W_i + b$; what follows is the usual LSTM step. All
    four of its matrices, for the input and for the state, come from the same
    experts.

    `MoELSTM` is the layer to use in a model. The cell is for own recurrences: it
    cannot add losses (inside a loop Keras does not allow it), so by itself
    nothing balances its experts.

    Args:
        units: Int. Units of the state and of the output.
        num_experts: Int. Number of weight matrices.
        gating: The gate, a layer that maps `(batch, features + units)` to a
            `GatingResult`: `NoisyTopKGating`, `TopKGating`, `SoftmaxGating` or
            an own one that gives every token the same number of experts and has
            no losses of its own. None means that of `MoE`. Defaults to
            `None`.
        activation: Activation of the cell input and of the state. Defaults to
            `"tanh"`.
        recurrent_activation: Activation of the three LSTM gates. Defaults to
            `"sigmoid"`.
        kernel_initializer: Initial value of the part of every expert that sees
            the input. Defaults to `"glorot_uniform"`.
        recurrent_initializer: Initial value of the part that sees the state.
            Defaults to `"orthogonal"`.
        bias_initializer: Initial value of the bias. Defaults to `"zeros"`.
        unit_forget_bias: Bool. Whether to add 1 to the forget gate's bias.
            Defaults to `True`.

    Call arguments:
        inputs: Float tensor `(batch, features)`.
        states: List of `h` and `c`, each `(batch, units)`.
        training: Bool. Whether the gate adds its noise.

    Input shape:
        `(batch, features)`.

    Output shape:
        `(batch, units)`, and the list of the next states.

    Losses and state:
        Weights `kernel` `(num_experts, features + units, 4 * units)`, the rows
        of the input first, and `bias` `(4 * units,)`; those of the gate. LSTM
        gates in the order i, f, g, o of `keras.layers.LSTM`. No losses.

    Raises:
        ValueError: A size is not positive; the gate is of another number of
            experts or of another kind; the gate sums over replicas in a loop.

    Several devices: under a strategy of replicas every device has all matrices and
    runs its own sequences, in `keras.layers.RNN`, also within `Bidirectional` and
    `StackedRNNCells`. A gate that counts tokens over all replicas (`LossFreeGating`)
    needs `unroll=True` there, since replicas cannot talk within a loop. On a mesh the
    matrices are sharded and `keras.layers.RNN` is unrolled, for a known number of steps.

    Example:

    >>> cell = keras_moe.layers.MoELSTMCell(8, num_experts=16)
    >>> keras.layers.RNN(cell)(np.ones((2, 5, 4), "float32")).shape.as_list()
    [2, 8]

    Reference:
        Shazeer et al. 2017, section 3.1.
    """

    def __init__(
        self,
        units: int,
        num_experts: int,
        gating: keras.layers.Layer | None = None,
        *,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        unit_forget_bias: bool = True,
        **kwargs: Any,
    ):
        units = checks.verify_positive_int(units, "units")
        num_experts = checks.verify_positive_int(num_experts, "num_experts")
        super().__init__(**kwargs)
        self.units = units
        self.num_experts = num_experts
        self.activation = keras.activations.get(activation)
        self.recurrent_activation = keras.activations.get(recurrent_activation)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.recurrent_initializer = keras.initializers.get(recurrent_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.unit_forget_bias = bool(unit_forget_bias)
        if gating is None:
            gating = default_gating(num_experts, self.dtype_policy)
        verify_causal([gating], "gating", "a recurrent mixture")
        share_num_experts(gating, num_experts)
        verify_recurrent_gate(gating)
        self.gating = gating
        warn_of_constant_gates(self)
        configs.hold(self, gating)
        self.state_size = [units, units]
        self.output_size = units

    def build(self, input_shape):
        here = engine.for_weights()
        features = checks.verify_input_shape(input_shape, type(self).__name__)
        shape = self.num_experts, features + self.units, 4 * self.units
        if here.unrolls_loops:
            # A row cannot leave its device in a loop; step by step it can.
            self.kernel = here.weights.add_expert_weight(
                self, shape, self._initial_kernel, "kernel"
            )
        else:
            self.kernel = self.add_weight(
                name="kernel", shape=shape, initializer=self._initial_kernel
            )
        self.bias = self.add_weight(
            name="bias", shape=(4 * self.units,), initializer=self._initial_bias
        )
        if not self.gating.built:
            self.gating.build((None, features + self.units))
        here.weights.note_experts([self.kernel])

    def _initial_kernel(self, shape, dtype=None):
        num_experts, rows, columns = shape
        parts = (
            (self.kernel_initializer, rows - self.units),
            (self.recurrent_initializer, self.units),
        )
        return tf.concat(
            [
                PerExpertInitializer(initializer)((num_experts, n, columns), dtype)
                for initializer, n in parts
            ],
            axis=1,
        )

    def _initial_bias(self, shape, dtype=None):
        bias = tf.convert_to_tensor(self.bias_initializer(shape, dtype))
        is_forget = tf.range(4 * self.units) // self.units == 1
        return bias + tf.cast(is_forget & self.unit_forget_bias, bias.dtype)

    def call(self, inputs, states, training=None):
        _, c = states
        u, chosen = self.choose(inputs, states, training)
        here = engine.current()
        if here.unrolls_loops:
            dispatcher = here.dispatcher(k_of(self.gating))  # type: ignore[misc]
            z = dispatcher.mix(self.matrices(), u, chosen).outputs
        else:
            # Of the sequences of this device, whose matrices are all here.
            plan = functional.make_plan_here(chosen.expert_indices, self.num_experts)
            z = functional.mixed_product(u, self.real_kernel(), chosen.gates, plan)
        h, c = functional.lstm_step(
            z + self.bias, c, self.activation, self.recurrent_activation
        )
        return h, [h, c]

    def choose(self, inputs, states, training=None) -> tuple:
        """What the gate sees, `(batch, features + units)`, and its `GatingResult`."""
        u = tf.concat([inputs, tf.cast(states[0], inputs.dtype)], axis=-1)
        chosen = self.gating(u, training=training)
        functional.verify_recurrent_gating(chosen)
        return u, chosen

    @property
    def moves_in_steps(self) -> bool:
        """Whether the gate draws or counts in every training step of a recurrence."""
        gating = self.gating
        return bool(getattr(gating, "has_noise", False)) or hasattr(
            gating, "note_counts"
        )

    def get_config(self):
        serialize = keras.initializers.serialize
        return {
            **super().get_config(),
            "units": self.units,
            "num_experts": self.num_experts,
            "gating": configs.serialize(self, self.gating),
            "activation": keras.activations.serialize(self.activation),
            "recurrent_activation": keras.activations.serialize(
                self.recurrent_activation
            ),
            "kernel_initializer": serialize(self.kernel_initializer),
            "recurrent_initializer": serialize(self.recurrent_initializer),
            "bias_initializer": serialize(self.bias_initializer),
            "unit_forget_bias": self.unit_forget_bias,
        }

    def real_kernel(self) -> tf.Tensor:
        """`kernel` without padding, which is seen where shapes are inferred for a mesh."""
        kernel = tf.convert_to_tensor(self.kernel)
        if kernel.shape[0] == self.num_experts:
            return kernel
        return kernel[: self.num_experts]

    def matrices(self) -> "Matrices":
        """Its experts, for a dispatcher."""
        return Matrices(self)

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        gating = configs.deserialize(config.get("gating"), config["num_experts"])
        return cls(**{**config, "gating": gating})
