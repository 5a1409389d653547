"""An LSTM that attends to a memory at every step."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine
from keras_moe.layers import configs
from keras_moe.layers.attention import MultiplicativeAttention


@keras.saving.register_keras_serializable(package="keras_moe")
class AttentionLSTM(keras.layers.Layer):
    """The first layer of GNMT's decoder: attention inside the recurrence.

    Step t asks the memory with the output of the step before, and its LSTM takes
    what comes back beside its input:

    $a_t = \\mathrm{attend}(h_{t-1})$,
    $h_t, c_t = \\mathrm{LSTM}([x_t, a_t], h_{t-1}, c_{t-1})$

    Args:
        cell: An LSTM cell with the states `[h, c]`, such as
            `keras.layers.LSTMCell(units)` or `ProjectedLSTMCell`.
        attention: A `MultiplicativeAttention`. None makes one. Defaults to
            `None`.

    Call arguments:
        inputs: Float tensor `(batch, time, features)`.
        memory: Float tensor `(memory batch, source, memory features)`. The batch
            is a multiple of the memory's: consecutive rows share a memory, as the
            hypotheses of one sentence do in a beam search.
        memory_mask: Bool tensor `(memory batch, source)` or None. False is padding.
        initial_state: List of h and c, or None for zeros.

    Input shape:
        As above; time may be unknown, and zero.

    Output shape:
        `(batch, time, units)` and the list of the last h and c.

    Losses and state:
        Weights of the cell and of the attention. No losses, no carried state.
        Steps are not masked: padding belongs to the end of `inputs`, where it
        changes no earlier output.

    Raises:
        ValueError: `cell` does not have two states; a last dimension is unknown; on a
            mesh, where the loop is written out step by step, the number of steps is.

    Example:

    >>> layer = keras_moe.layers.AttentionLSTM(keras.layers.LSTMCell(6))
    >>> outputs, state = layer(
    ...     np.ones((2, 3, 8), "float32"), np.ones((2, 5, 4), "float32")
    ... )
    >>> outputs.shape.as_list()
    [2, 3, 6]

    Reference:
        Shazeer et al. 2017, appendix E; Wu et al. 2016, section 3.
    """

    def __init__(
        self,
        cell: keras.layers.Layer,
        attention: MultiplicativeAttention | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        sizes = getattr(cell, "state_size", None)
        if not isinstance(sizes, (list, tuple)) or len(sizes) != 2:
            raise ValueError(
                "`cell` must be an LSTM cell with the states h and c. Received: "
                f"cell={cell!r}, state_size={sizes!r}. Use keras.layers.LSTMCell or "
                "keras_moe.layers.ProjectedLSTMCell."
            )
        self.cell = cell
        self.attention = (
            MultiplicativeAttention(dtype=self.dtype_policy)
            if attention is None
            else attention
        )
        configs.hold(self, cell, self.attention)

    def build(self, inputs_shape, memory_shape):
        name = type(self).__name__
        features = checks.verify_input_shape(inputs_shape, name)
        memory_features = checks.verify_input_shape(memory_shape, name)
        if not self.attention.built:
            query_shape = (None, None, self.cell.output_size)
            self.attention.build(query_shape, memory_shape)
        if not self.cell.built:
            self.cell.build((None, features + memory_features))

    def call(self, inputs, memory, memory_mask=None, initial_state=None, training=None):
        keys = self.attention.keys_of(memory)
        h, c = (
            self.initial_state(tf.shape(inputs)[0])
            if initial_state is None
            else (initial_state)
        )

        batch, memories = inputs.shape[0], memory.shape[0]
        for name, state, size in zip("hc", (h, c), self.cell.state_size, strict=True):
            checks.verify_shape([batch, size], "of `initial_state`", **{name: state})
        if batch and memories and batch % memories:
            raise ValueError(
                "`inputs` must have a multiple of the rows of `memory`. Received: "
                f"inputs.shape={inputs.shape}, memory.shape={memory.shape}. Give each "
                "memory as many rows."
            )

        def step(x, h, c):
            context = self._context(h, keys, memory, memory_mask)
            x = tf.concat([x, context], axis=-1)
            return self.cell(x, [h, c], training=training)

        here = engine.current()
        if here.unrolls_loops:
            return _unrolled(inputs, h, c, step)
        if not (training and getattr(self.cell, "moves_in_steps", False)):
            return self._in_a_loop(inputs, h, c, step)
        with here.replicas.before_loop(tf.shape(inputs)[0]):
            return self._in_a_loop(inputs, h, c, step)

    def _in_a_loop(self, inputs, h, c, step):
        inputs_by_time = tf.transpose(inputs, [1, 0, 2])
        steps = tf.shape(inputs_by_time)[0]

        def body(time, h, c, outputs):
            output, (h, c) = step(inputs_by_time[time], h, c)
            return time + 1, h, c, outputs.write(time, output)

        outputs = tf.TensorArray(
            inputs.dtype, steps, element_shape=(inputs.shape[0], self.cell.output_size)
        )
        _, h, c, outputs = tf.while_loop(
            lambda time, *_: time < steps,
            body,
            (tf.constant(0), h, c, outputs),
            maximum_iterations=steps,
        )
        result = tf.transpose(outputs.stack(), [1, 0, 2])
        result.set_shape((*inputs.shape[:2], self.cell.output_size))
        return result, [h, c]

    def _context(self, h, keys, memory, memory_mask):
        """`(batch, units)` -> `(batch, memory features)`."""
        # Rows that share a memory are so many queries to it.
        memories = memory.shape[0] or tf.shape(memory)[0]
        queries = tf.reshape(h, [memories, -1, h.shape[-1]])
        weights = self.attention.weights_of(queries, keys, memory_mask)
        return tf.reshape(tf.matmul(weights, memory), [-1, memory.shape[-1]])

    def initial_state(self, batch_size) -> list:
        """Zero states.

        Args:
            batch_size: Int or scalar int tensor.

        Returns:
            List of h and c, `(batch_size, state units)`.
        """
        return [
            tf.zeros((batch_size, size), self.compute_dtype)
            for size in self.cell.state_size
        ]

    def attention_weights(self, outputs, memory, memory_mask=None) -> tf.Tensor:
        """How much of each memory position every step took.

        All steps at once, from the outputs that asked: step t asked with the
        output of step t - 1, the first with zeros.

        Args:
            outputs: `(batch, time, units)`, of a call from the zero state.
            memory: `(batch, source, memory features)`.
            memory_mask: `(batch, source)` bool or None.

        Returns:
            `(batch, time, source)`.
        """
        queries = tf.pad(outputs[:, :-1], [[0, 0], [1, 0], [0, 0]])
        keys = self.attention.keys_of(memory)
        return self.attention.weights_of(queries, keys, memory_mask)

    def compute_output_shape(self, inputs_shape, memory_shape):
        batch = inputs_shape[0]
        states = [(batch, size) for size in self.cell.state_size]
        return (*inputs_shape[:-1], self.cell.output_size), states

    def get_config(self):
        return {
            **super().get_config(),
            "cell": configs.serialize(self, self.cell),
            "attention": configs.serialize(self, self.attention),
        }

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        parts = {key: configs.deserialize(config.get(key)) for key in _PARTS}
        return cls(**{**config, **parts})


def _unrolled(inputs, h, c, step):
    """Step by step, where a loop has no gradient."""
    if not inputs.shape[1]:
        raise ValueError(
            "`inputs` of an unrolled recurrence must have a known number of time steps, "
            f"at least 1. Received: inputs.shape={inputs.shape}. Pad sequences to one "
            "length."
        )
    outputs = []
    for x in tf.unstack(inputs, axis=1):
        output, (h, c) = step(x, h, c)
        outputs.append(output)
    return tf.stack(outputs, axis=1), [h, c]


_PARTS = ("cell", "attention")
