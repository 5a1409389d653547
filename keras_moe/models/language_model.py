"""The LSTM language model with a mixture of experts between its LSTMs."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.vocabulary import PAD_ID
from keras_moe.layers import configs
from keras_moe.layers.dropout import Dropout
from keras_moe.layers.embedding import Embedding
from keras_moe.layers.moe import MoE, mixtures_of
from keras_moe.layers.sampled_softmax import SampledSoftmax
from keras_moe.layers.tracking import track_entries
from keras_moe.layers.word_scores import Dense as WordScores
from keras_moe.models.generation import Generation
from keras_moe.models.language_model_checks import (
    as_middle,
    verify_tokens,
)
from keras_moe.models.parts import (
    SavedWhole,
    TracedFunctions,
    make_lstm,
    verify_states,
    verify_width,
    zero_states,
)
from keras_moe.models.sampled_training import SampledTraining, scores_of
from keras_moe.models.stream_state import ResetAtEpochBegin, StreamState
from keras_moe.types import at_least_float32


@keras.saving.register_keras_serializable(package="keras_moe")
class MoELanguageModel(SavedWhole, Generation, SampledTraining, keras.Model):
    """Embedding, LSTM, middle layers, LSTM, softmax (appendix C.1).

    The output of every layer but the softmax goes through dropout, and then the
    output of the previous layer is added (no such residual after the
    embedding). A `MoE` in the middle sees all time steps of the batch at once.
    Without a `MoE` the same class builds the paper's baselines; see
    `keras_moe.models.middle_layers`.

    Train it on a stream of text with `stateful=True`: row b of each batch goes
    on where row b of the batch before ended, and the states of the LSTMs are
    carried from batch to batch, in training and in evaluation alike. `fit`
    starts every epoch from zero state; `evaluate` and `predict` start and end
    with it.

    Args:
        vocabulary_size: Int. Number of token ids; id 0 is padding.
        units: Int. Width of every layer's output. Defaults to `512`.
        middle: A layer, a list of layers, or None. What stands between the two
            LSTMs, each with output width `units`. A recurrent layer there must
            have `return_sequences=True` and `return_state=True`. Defaults to
            `None`: nothing.
        lstm_units: Int or None. Units of the LSTM cells, whose output is then
            projected to `units`; None means `units` and no projection.
            Defaults to `None`.
        lstm_layers: Int. `2`, or `1` to leave out the last LSTM, as in the
            baseline LSTM-2048-512. Defaults to `2`.
        dropout: Float. Fraction of each output that is dropped (the paper's
            DropProb). Defaults to `0.1`.
        stateful: Bool. Whether states are carried from batch to batch. The model
            then tells Keras not to compile it with XLA. Defaults to `False`.
        num_sampled: Int or None. Candidates of the softmax in the training
            steps of `fit`, see `SampledSoftmax`; ids must then be in the order
            of falling frequency. Metrics of the logits are left to evaluation,
            which uses the full softmax. None trains the full softmax. Defaults
            to `None`.

    Call arguments:
        inputs: Int tensor `(batch, time)` of token ids.
        training: Bool. Whether to apply dropout and the gates' noise.

    Input shape:
        `(batch, time)`. With `stateful` all batches of a stream have one size.

    Output shape:
        Logits `(batch, time, vocabulary_size)`, float32 under every policy.
        Position t predicts token t + 1.

    Losses and state:
        The balancing losses of the mixtures. Padding (id 0) is neither routed
        nor counted, and carries a Keras mask to loss and metrics. The carried
        states are no weights: they are not saved.

    Raises:
        ValueError: A size or rate is out of range; inputs are not integers of
            rank 2; a recurrent middle layer does not return its state.
        tf.errors.InvalidArgumentError: With `stateful`, the batch size changes
            within a stream.

    Example:

    >>> model = keras_moe.models.MoELanguageModel(
    ...     vocabulary_size=100,
    ...     units=16,
    ...     middle=keras_moe.layers.MoE(
    ...         keras_moe.layers.FeedForwardExperts(8, hidden_units=32),
    ...         activation="sigmoid",
    ...     ),
    ... )
    >>> model(np.ones((2, 5), "int32")).shape.as_list()
    [2, 5, 100]

    Reference:
        Shazeer et al. 2017, section 5.1 and appendix C; Jozefowicz et al.
        2016, "Exploring the limits of language modeling".
    """

    def __init__(
        self,
        vocabulary_size: int,
        units: int = 512,
        *,
        middle: keras.layers.Layer | Sequence[keras.layers.Layer] | None = None,
        lstm_units: int | None = None,
        lstm_layers: int = 2,
        dropout: float = 0.1,
        stateful: bool = False,
        num_sampled: int | None = None,
        name: str = "moe_language_model",
        **kwargs: Any,
    ):
        vocabulary_size = checks.verify_positive_int(vocabulary_size, "vocabulary_size")
        units = checks.verify_positive_int(units, "units")
        if lstm_units is not None:
            lstm_units = checks.verify_positive_int(lstm_units, "lstm_units")
        lstm_layers = checks.verify_int(lstm_layers, "lstm_layers", 1, 2)
        dropout = checks.verify_rate(dropout, "dropout")
        super().__init__(name=name, **kwargs)
        self.vocabulary_size = vocabulary_size
        self.units = units
        self.lstm_units = lstm_units
        self.lstm_layers = lstm_layers
        self.dropout = dropout
        self.stateful = bool(stateful)
        # The carried states get the rows of the first batch of a stream: XLA cannot
        # change a variable's shape, nor check that all batches have as many.
        self.supports_jit = not self.stateful
        self.middle = as_middle(middle)
        track_entries(self, "middle")
        configs.hold(self, *self.middle)
        policy = self.dtype_policy
        self.embedding = Embedding(
            vocabulary_size, units, name="embedding", dtype=policy
        )
        self.first_lstm = make_lstm(units, lstm_units, "first_lstm", policy)
        self.last_lstm = (
            make_lstm(units, lstm_units, "last_lstm", policy)
            if lstm_layers == 2
            else None
        )
        self.num_sampled = num_sampled and int(num_sampled)
        self.softmax = self._make_softmax()
        self.dropouts = [
            Dropout(dropout, dtype=policy) for _ in range(len(self.stack) + 1)
        ]
        self._stream_state = StreamState()
        self._traced_functions = TracedFunctions()

    def _make_softmax(self):
        dtype = at_least_float32(self.compute_dtype).name
        options: dict[str, Any] = {"dtype": dtype, "name": "softmax"}
        if self.num_sampled is None:
            return WordScores(self.vocabulary_size, **options)
        return SampledSoftmax(self.vocabulary_size, self.num_sampled, **options)

    @property
    def stack(self) -> list[keras.layers.Layer]:
        """The layers between embedding and softmax, in order."""
        last = [] if self.last_lstm is None else [self.last_lstm]
        return [self.first_lstm, *self.middle, *last]

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixtures among the middle layers."""
        return mixtures_of(self.middle)

    def build(self, input_shape):
        shape = (None, None, self.units)
        self.embedding.build((None, None))
        for dropout in self.dropouts:
            dropout.build(shape)
        for layer in self.stack:
            if not layer.built:
                layer.build(shape)
            if isinstance(layer, MoE):
                verify_width(layer, self.units)
        self.softmax.build(shape)
        self.built = True

    def call(self, inputs, training=None):
        inputs = verify_tokens(inputs, self.vocabulary_size)
        state = self.initial_state(tf.shape(inputs)[0])
        if not self.stateful:
            return self._run(inputs, state, training)[0]
        state = self._stream_state.read(state)
        logits, state = self._run(inputs, state, training)
        self._stream_state.write(state)
        return logits

    def call_with_state(self, tokens, state, training: bool = False):
        """Logits and the states to go on with; nothing is carried or written.

        Args:
            tokens: Int tensor `(batch, time)`.
            state: From `initial_state` or an earlier call.
            training: Bool. Defaults to `False`.

        Returns:
            logits: `(batch, time, vocabulary_size)`.
            state: The states after the last time step.
        """
        tokens = verify_tokens(tokens, self.vocabulary_size, "tokens")
        if not self.built:
            self.build(tokens.shape)
        return self._run(tokens, state, training)

    def initial_state(self, batch_size):
        """Zero states: for each recurrent layer the list of its states.

        Args:
            batch_size: Int or scalar int tensor.

        Returns:
            List of lists of `(batch_size, state units)` tensors.
        """
        recurrent = [x for x in self.stack if isinstance(x, keras.layers.RNN)]
        return zero_states(recurrent, batch_size, self.compute_dtype)

    def hidden_with_state(
        self, tokens, state, training: bool = False, *, state_mask=None
    ):
        """What the softmax is given, and the states to go on with.

        Args:
            tokens: Int tensor `(batch, time)`.
            state: From `initial_state` or an earlier call.
            training: Bool. Defaults to `False`.
            state_mask: Bool tensor `(batch, time)` or None. Recurrent states
                pass over the time steps marked False. None: no such steps.
                Defaults to `None`.

        Returns:
            hidden: `(batch, time, units)`; `self.softmax(hidden)` are logits.
            state: The states after the last time step.
        """
        recurrent = [x for x in self.stack if isinstance(x, keras.layers.RNN)]
        verify_states(recurrent, state, tokens.shape[0])
        checks.verify_shape(tokens.shape, "that of `tokens`", state_mask=state_mask)
        if 0 in tokens.shape[:2]:
            return self._hidden_of_nothing(tokens, state, training)
        mask = tf.not_equal(tokens, PAD_ID)
        hidden = self.embedding(tokens)
        hidden = self.dropouts[0](hidden, training=training)
        state = iter(state)
        next_state = []
        for layer, dropout in zip(self.stack, self.dropouts[1:], strict=True):
            if isinstance(layer, keras.layers.RNN):
                # By itself the recurrence takes no mask: padding comes after the
                # text, where it changes no earlier output; streams have none.
                output, *layer_state = layer(
                    hidden,
                    initial_state=next(state),
                    mask=state_mask,
                    training=training,
                )
                next_state.append(layer_state)
            elif isinstance(layer, MoE):
                output = layer(hidden, mask=mask, training=training)
            else:
                output = layer(hidden)
            hidden = hidden + dropout(output, training=training)
        return hidden, next_state

    def _hidden_of_nothing(self, tokens, state, training):
        """No rows or no time steps, on which Keras' recurrent layers fail: padded."""
        rows, time = tokens.shape
        more = [0, int(rows == 0)]
        padded = tf.pad(tokens, [more, [0, int(time == 0)]])
        padded_state = [[tf.pad(s, [more, [0, 0]]) for s in each] for each in state]
        hidden, next_state = self.hidden_with_state(padded, padded_state, training)
        if time != 0:
            state = [[s[:rows] for s in each] for each in next_state]
        return hidden[:rows, :time], state

    def _run(self, tokens, state, training):
        hidden, next_state = self.hidden_with_state(tokens, state, training)
        sampled = bool(training) and self.num_sampled is not None
        return scores_of(self.softmax, hidden, sampled), next_state

    def compute_mask(self, inputs, previous_mask=None):
        return keras.ops.not_equal(inputs, PAD_ID)

    def reset_state(self) -> None:
        """Sets the carried states to zero."""
        self._stream_state.reset()

    def fit(self, *args, callbacks=None, **kwargs):
        if self.stateful:
            callbacks = ResetAtEpochBegin.added_to(callbacks)
        history = super().fit(*args, callbacks=callbacks, **kwargs)
        self.reset_state()
        return history

    def evaluate(self, *args, **kwargs):
        self.reset_state()
        result = super().evaluate(*args, **kwargs)
        self.reset_state()
        return result

    def predict(self, *args, **kwargs):
        self.reset_state()
        result = super().predict(*args, **kwargs)
        self.reset_state()
        return result

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "units": self.units,
            "middle": configs.serialize_all(self, self.middle),
            "lstm_units": self.lstm_units,
            "lstm_layers": self.lstm_layers,
            "dropout": self.dropout,
            "stateful": self.stateful,
            "num_sampled": self.num_sampled,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        checks.verify_config(cls, config)
        middle = configs.deserialize_all(config.get("middle"), custom_objects)
        return cls(**{**config, "middle": middle})
