"""A mixture of experts inside the recurrence of an LSTM (section 3.1)."""

import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers import configs
from keras_moe.layers.balance_losses import add_balance
from keras_moe.layers.balance_metric import BalanceMetric
from keras_moe.layers.gate_contract import (
    loss_weights_config,
    set_loss_weights,
    warn_of_flat_load,
)
from keras_moe.layers.gating import k_of
from keras_moe.layers.moe import default_name
from keras_moe.layers.moe_lstm_cell import MoELSTMCell
from keras_moe.layers.step_clock import noted_later


@keras.saving.register_keras_serializable(package="keras_moe")
class MoELSTM(keras.layers.RNN):
    """An LSTM whose weight matrix is a mixture of experts.

    At every time step a gate looks at $u_t = [x_t, h_{t-1}]$ and picks k of
    `num_experts` weight matrices: $z_t = \\sum_i G(u_t)_i \\, u_t W_i + b$. So the
    recurrence itself has as many parameters as there are experts, at the cost of
    k LSTMs. With one expert it is `keras.layers.LSTM`.

    The balancing losses are those of `MoE`, formed over all time steps of the
    batch at once, padding left out.

    Args:
        units: Int. Units of the state and of the output.
        num_experts: Int. Number of weight matrices.
        gating: The gate, as for `MoELSTMCell`. None means that of `MoE`. Defaults
            to `None`.
        importance_loss_weight: Float or None. Weight of the importance loss (equation
            7). None means 0.1, and 0 with a gate that balances without a loss, as for
            `MoE`. Defaults to `None`.
        load_loss_weight: Float or None. Weight of the load loss (equation 11).
            None means 0.1 where the load is smooth, else 0, as for `MoE`. Defaults
            to `None`.
        losses_in_evaluation: Bool. As for `MoE`. Defaults to `False`.
        segment_length: Int or None. Keep only every so-manieth state for the
            backward pass and compute the steps between again there: less
            memory, about a third more operations, same gradients. The square
            root of the sequence length is a good choice. Defaults to `None`.
        activation: As for `MoELSTMCell`. Defaults to `"tanh"`.
        recurrent_activation: As for `MoELSTMCell`. Defaults to `"sigmoid"`.
        kernel_initializer: As for `MoELSTMCell`. Defaults to
            `"glorot_uniform"`.
        recurrent_initializer: As for `MoELSTMCell`. Defaults to
            `"orthogonal"`.
        bias_initializer: As for `MoELSTMCell`. Defaults to `"zeros"`.
        unit_forget_bias: As for `MoELSTMCell`. Defaults to `True`.
        return_sequences: Bool. Whether to return the output of every step.
            Defaults to `False`.
        return_state: Bool. Whether to return the last `h` and `c` too. Defaults
            to `False`.
        go_backwards: Bool. Whether to go from the last step to the first and
            return outputs in that order. Defaults to `False`.
        stateful: Bool. Whether a batch begins with the states that the one
            before ended with. Defaults to `False`.

    Call arguments:
        sequences: Float tensor `(batch, time, features)`.
        initial_state: List of `h` and `c`, each `(batch, units)`, or None.
        mask: Bool tensor `(batch, time)` or None. A step marked False keeps the
            state and counts in no loss and no statistic.
        training: Bool. Whether the gate adds its noise and the layer its losses.

    Input shape:
        `(batch, time, features)`; batch and time may be unknown.

    Output shape:
        `(batch, units)`, or `(batch, time, units)` with `return_sequences`; with
        `return_state` a list of it, `h` and `c`.

    Losses and state:
        Weights of the cell. Adds the two losses in training, and shows the
        balance of the experts in the logs of `fit`, as `MoE` does.

    Raises:
        ValueError: As for `MoELSTMCell`; a weight is negative;
            `segment_length` is not positive.

    Noise: drawn for all steps before the loop. An own gate that draws random
    numbers must offer `draw_noise(num_tokens)` and take the result as the call
    argument `noise`; nothing else random may happen inside the recurrence.

    Several devices: under a strategy of replicas every device has all matrices and runs
    its own sequences. On a mesh the matrices are sharded, the loop is written out step
    by step, for a known number of steps, and `segment_length` changes nothing.

    XLA: `jit_compile=True` works; experts then have static slots, as in `MoE`.

    Example:

    >>> layer = keras_moe.layers.MoELSTM(8, num_experts=16, return_sequences=True)
    >>> layer(np.ones((2, 5, 4), "float32"), training=True).shape.as_list()
    [2, 5, 8]
    >>> len(layer.losses)
    2

    Reference:
        Shazeer et al. 2017, section 3.1.
    """

    def __init__(
        self,
        units: int,
        num_experts: int,
        gating: keras.layers.Layer | None = None,
        *,
        importance_loss_weight: float | None = None,
        load_loss_weight: float | None = None,
        losses_in_evaluation: bool = False,
        segment_length: int | None = None,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        unit_forget_bias: bool = True,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ):
        if kwargs.pop("unroll", False):
            raise ValueError(
                "`unroll` is not supported. Received: unroll=True. The loop sums the "
                "balance of all steps and stays a loop; leave it out."
            )
        if segment_length is not None:
            segment_length = checks.verify_positive_int(
                segment_length, "segment_length"
            )
        cell = MoELSTMCell(
            units,
            num_experts,
            gating,
            activation=activation,
            recurrent_activation=recurrent_activation,
            kernel_initializer=kernel_initializer,
            recurrent_initializer=recurrent_initializer,
            bias_initializer=bias_initializer,
            unit_forget_bias=unit_forget_bias,
            dtype=kwargs.get("dtype"),
            name="cell",
        )
        super().__init__(
            cell,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            name=name or default_name("moe_lstm"),
            **kwargs,
        )
        set_loss_weights(self, importance_loss_weight, load_loss_weight)
        warn_of_flat_load(self)
        self.losses_in_evaluation = bool(losses_in_evaluation)
        self.segment_length = segment_length
        self.input_spec = keras.layers.InputSpec(ndim=3)

    @property
    def units(self) -> int:
        """Units of the state and of the output."""
        return self.cell.units

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.cell.num_experts

    @property
    def gating(self) -> keras.layers.Layer:
        """The gate."""
        return self.cell.gating

    def build(self, sequences_shape, initial_state_shape=None):
        checks.verify_input_shape(sequences_shape, type(self).__name__)
        super().build(sequences_shape, initial_state_shape)
        if self.num_experts > 1 and not hasattr(self, "balance"):
            self.balance = BalanceMetric(self.num_experts, name=self.name)

    def call(self, sequences, initial_state=None, mask=None, training=False):
        checks.verify_dense(sequences, type(self).__name__)
        return super().call(sequences, initial_state, mask, training)

    def inner_loop(self, sequences, initial_state, mask, training=False):
        checks.verify_floating(sequences.dtype, type(self).__name__)
        checks.verify_shape(sequences.shape[:2], "one value a step", mask=mask)
        inputs = tf.transpose(sequences, [1, 0, 2])  # (time, batch, features)
        if mask is not None:
            mask = tf.transpose(tf.cast(mask, tf.bool), [1, 0])
        if self.go_backwards:
            inputs = _reversed(inputs)
            mask = mask if mask is None else _reversed(mask)
        cell = self.cell
        # Before the gate's state is read: a schedule of its noise looks for a new step.
        noise = self._noise(inputs, training)
        h, c = (tf.convert_to_tensor(state) for state in initial_state)
        options = {
            "weights": [
                tf.convert_to_tensor(v) for v in self.gating.trainable_variables
            ],
            "noise": noise,
            "mask": mask,
            "activation": cell.activation,
            "recurrent_activation": cell.recurrent_activation,
        }
        here, route = engine.current(), self._route(training)
        if here.unrolls_loops:
            experts = cell.matrices()
            dispatcher = here.dispatcher(k_of(self.gating))  # type: ignore[misc]
            bias = tf.convert_to_tensor(cell.bias)
            result = functional.unrolled_moe_lstm(
                inputs, h, c, experts, bias, route, dispatcher, **options
            )
        else:
            result = functional.moe_lstm(
                inputs,
                h,
                c,
                cell.real_kernel(),
                tf.convert_to_tensor(cell.bias),
                route,
                segment_length=self.segment_length,
                keep_steps=bool(training),
                **options,
            )
        kept = result.choices_kept
        add_balance(self, result.statistics, training, choices_kept=kept)
        if training and hasattr(self.gating, "note_counts"):
            self.gating.note_counts(result.statistics.counts, inputs)
        outputs = result.hidden
        if mask is not None:
            # As in Keras: zero until the first step that is not masked, and
            # with `zero_output_for_mask` at every masked step.
            shown = mask if self.zero_output_for_mask else _seen(mask)
            # Of one shape: DTensor takes no other.
            shown = shown[..., tf.newaxis] | tf.zeros_like(outputs, tf.bool)
            outputs = tf.where(shown, outputs, tf.zeros_like(outputs))
        last = outputs[-1]
        return last, tf.transpose(outputs, [1, 0, 2]), [result.h, result.c]

    def _noise(self, inputs, training):
        """`(time, batch, ...)` for all steps, or None."""
        if not training or not hasattr(self.gating, "draw_noise"):
            return None
        here, draw = engine.current(), self.gating.draw_noise
        if here.unrolls_loops:  # where all shapes are known
            time, batch = inputs.shape[:2]
        else:
            time, batch = tf.unstack(tf.shape(inputs)[:2])
        whole, options = batch, {}
        if here.replicas.number > 1:
            # The numbers of one device, step by step: drawn for the global batch, of
            # which this replica takes its examples.
            batches = here.replicas.gather(batch)
            whole, first = (
                tf.reduce_sum(part)
                for part in (batches, batches[: here.replicas.index])
            )
            if "first_row" in inspect.signature(draw).parameters:
                options["first_row"] = 0
        noise = draw(time * whole, **options)
        tail = noise.shape[1:]
        noise = tf.reshape(noise, tf.concat([[time, whole], tail], axis=0))
        if here.replicas.number > 1:
            noise = noise[:, first : first + batch]
        noise.set_shape([*inputs.shape[:2], *tail])
        return noise

    def _route(self, training):
        """The gate as a pure function of its inputs and weights."""
        gating = self.gating
        variables = gating.trainable_variables
        fixed = [(v, tf.convert_to_tensor(v)) for v in gating.non_trainable_variables]
        takes_noise = "noise" in inspect.signature(gating.call).parameters

        def route(u, noise, mask, *weights):
            options = {"noise": noise} if takes_noise else {}
            # Not `stateless_call`, which neither casts to the gate's type nor reads
            # its weights in it.
            mapping = [*zip(variables, weights, strict=True), *fixed]
            with keras.StatelessScope(state_mapping=mapping), noted_later():
                return gating(u, mask=mask, training=training, **options)

        return route

    def get_config(self):
        config = super().get_config()
        for name in ("cell", "unroll"):
            del config[name]
        cell = self.cell.get_config()
        for name in ("name", "trainable", "dtype"):
            del cell[name]
        return {
            **config,
            **cell,
            **loss_weights_config(self),
            "losses_in_evaluation": self.losses_in_evaluation,
            "segment_length": self.segment_length,
        }

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        gating = configs.deserialize(config.get("gating"), config["num_experts"])
        return cls(**{**config, "gating": gating})


def _reversed(x):
    """The steps of `(time, ...)` from the last to the first."""
    if not engine.current().unrolls_loops:
        return tf.reverse(x, [0])
    return tf.stack(tf.unstack(x)[::-1])  # DTensor cannot expand the other


def _seen(mask):
    """Whether there was a real step up to here, `(time, batch)` bool."""
    return tf.cumsum(tf.cast(mask, tf.int32), axis=0) > 0
