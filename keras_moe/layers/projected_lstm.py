"""Recurrent layers that Keras does not have."""

from functools import partial
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers.initializers import in_single_precision


@keras.saving.register_keras_serializable(package="keras_moe")
class ProjectedLSTMCell(checks.FromConfig, keras.layers.Layer):
    """One step of an LSTM whose output is projected to fewer units.

    The projected output is what the next step and the next layer see, so a wide
    cell costs `4 * (features + projection_units) * units` instead of
    `4 * (features + units) * units` multiply-adds. With
    `keras.layers.RNN(cell)` it makes a layer with masks, `stateful`,
    `go_backwards` and `return_state` as for any Keras cell.

    Args:
        units: Int. Units of the cell state.
        projection_units: Int. Units of the output.
        kernel_initializer: Initial value of `kernel` and `projection_kernel`.
            Defaults to `"glorot_uniform"`.
        recurrent_initializer: Initial value of `recurrent_kernel`. Defaults to
            `"orthogonal"`.

    Call arguments:
        inputs: Float tensor `(batch, features)`.
        states: List of `h` `(batch, projection_units)` and `c`
            `(batch, units)`.

    Input shape:
        `(batch, features)`.

    Output shape:
        `(batch, projection_units)`, and the list of the next states.

    Losses and state:
        Weights `kernel` `(features, 4 * units)`, `recurrent_kernel`
        `(projection_units, 4 * units)`, `bias` `(4 * units,)` with 1 for the
        forget gates, `projection_kernel` `(units, projection_units)`. Gates in
        the order input, forget, cell, output, as in `keras.layers.LSTM`.

    Raises:
        ValueError: A size is not positive.

    Example:

    >>> cell = keras_moe.layers.ProjectedLSTMCell(32, projection_units=8)
    >>> keras.layers.RNN(cell)(np.ones((2, 5, 4), "float32")).shape.as_list()
    [2, 8]

    Reference:
        Sak et al. 2014, "Long short-term memory recurrent neural network
        architectures"; Shazeer et al. 2017, appendix C.1 and C.2.
    """

    def __init__(
        self,
        units: int,
        projection_units: int,
        *,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.units = checks.verify_positive_int(units, "units")
        self.projection_units = checks.verify_positive_int(
            projection_units, "projection_units"
        )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.recurrent_initializer = keras.initializers.get(recurrent_initializer)
        self.state_size = [self.projection_units, self.units]
        self.output_size = self.projection_units

    def build(self, input_shape):
        engine.note_layer()
        features = checks.verify_input_shape(input_shape, type(self).__name__)
        self.kernel = self.add_weight(
            name="kernel",
            shape=(features, 4 * self.units),
            initializer=self.kernel_initializer,
        )
        self.recurrent_kernel = self.add_weight(
            name="recurrent_kernel",
            shape=(self.projection_units, 4 * self.units),
            initializer=partial(in_single_precision, self.recurrent_initializer),
        )
        self.bias = self.add_weight(
            name="bias", shape=(4 * self.units,), initializer=self._initial_bias
        )
        self.projection_kernel = self.add_weight(
            name="projection_kernel",
            shape=(self.units, self.projection_units),
            initializer=self.kernel_initializer,
        )

    def _initial_bias(self, shape, dtype=None):
        forget = tf.ones((self.units,), dtype)
        return tf.concat([forget * 0, forget, forget * 0, forget * 0], axis=0)

    def call(self, inputs, states, training=None):
        h, c = states
        checks.verify_shape([*inputs.shape[:1], None], "a row for each input", h=h, c=c)
        z = tf.matmul(inputs, self.kernel) + tf.matmul(h, self.recurrent_kernel)
        h, c = functional.lstm_step(z + self.bias, c)
        h = tf.matmul(h, self.projection_kernel)
        return h, [h, c]

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.units,
            "projection_units": self.projection_units,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "recurrent_initializer": keras.initializers.serialize(
                self.recurrent_initializer
            ),
        }
