"""GNMT with mixtures of experts: an encoder, attention, a decoder."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.subwords import SubwordVocabulary
from keras_moe.data.vocabulary import PAD_ID
from keras_moe.layers import configs
from keras_moe.layers.attention_lstm import AttentionLSTM
from keras_moe.layers.dropout import Dropout
from keras_moe.layers.embedding import Embedding
from keras_moe.layers.moe import MoE, mixtures_of
from keras_moe.layers.routing_record import recorded_routing, routing_arrays
from keras_moe.layers.tracking import track_entries
from keras_moe.layers.word_scores import Dense as WordScores
from keras_moe.models.parts import (
    SavedWhole,
    TracedFunctions,
    make_cell,
    make_lstm,
    verify_width,
    zero_states,
)
from keras_moe.models.translation_checks import (
    as_middle,
    split_inputs,
    verify_distinct,
    verify_stack,
    verify_vocabulary,
)
from keras_moe.models.translation_decoding import Decoding
from keras_moe.types import at_least_float32

# So improbable that its probability and its gradient are exactly 0.
_NEVER = -1e9


class _BiasWithoutPadding(keras.initializers.Initializer):
    """Zeros, but padding is never predicted."""

    def __call__(self, shape, dtype=None):
        return tf.one_hot(PAD_ID, shape[0], on_value=_NEVER, off_value=0.0, dtype=dtype)


@keras.saving.register_keras_serializable(package="keras_moe")
class MoETranslator(SavedWhole, Decoding, keras.Model):
    """LSTM encoder and decoder with attention, and mixtures between the LSTMs.

    The paper's model is `MoETranslator(32_768, 512, lstm_units=2048,
    encoder_middle=..., decoder_middle=...)`: three LSTMs in the encoder with a
    mixture after the second, two in the decoder with one after the first. The
    first LSTM of the decoder takes the context of the attention beside its input,
    and asks the attention with its output (see `AttentionLSTM`). The output of
    every layer but the softmax goes through dropout, and then the output of the
    layer before is added. Without mixtures, or with `middle_layers("moe_1_wide",
    ...)` in their places, the same class builds the baselines.

    Paper: open there. LSTMs run from left to right (GNMT's lowest encoder layer
    runs both ways); the decoder starts from zero states.

    Args:
        vocabulary_size: Int. Number of subwords; ids 0 and 2 are padding and end
            of sentence.
        units: Int. Width of every layer's output. Defaults to `512`.
        encoder_middle: A layer, a list of layers, or None. What stands between
            the LSTMs of the encoder, with output width `units`. Defaults to
            `None`.
        decoder_middle: Likewise in the decoder, from new layers. Defaults to
            `None`.
        lstm_units: Int or None. Units of the LSTM cells, whose output is then
            projected to `units`; None means `units` and no projection. Defaults
            to `None`.
        encoder_lstms: Int. LSTMs of the encoder. Defaults to `3`.
        decoder_lstms: Int. LSTMs of the decoder. Defaults to `2`.
        middle_after: Two ints: LSTMs below the middle layers in encoder and
            decoder. Defaults to `(2, 1)`.
        dropout: Float. Fraction of each output that is dropped (the paper's
            DropProb). Defaults to `0.4`.
        vocabulary: `keras_moe.data.SubwordVocabulary` or None, saved with the
            model; needed to translate text. Defaults to `None`.

    Call arguments:
        inputs: Two int tensors: source `(batch, source length)` and target inputs
            `(batch, target length)`, the targets moved by one with `<eos>`
            first. Both are padded at the end.
        training: Bool. Whether to apply dropout and the gates' noise.

    Input shape:
        As above; all dimensions may be unknown.

    Output shape:
        Logits `(batch, target length, vocabulary_size)`, float32 under every
        policy. Position t predicts target t. That of padding is -1e9.

    Losses and state:
        The balancing losses of the mixtures. Padding is neither attended to,
        routed nor counted, and carries a Keras mask to loss and metrics.

    Raises:
        ValueError: A size or rate is out of range; inputs are not two integer
            tensors of rank 2; a middle layer is recurrent or has another width;
            `vocabulary` has another size.

    Example:

    >>> model = keras_moe.models.MoETranslator(
    ...     vocabulary_size=100,
    ...     units=16,
    ...     encoder_middle=keras_moe.layers.MoE(
    ...         keras_moe.layers.FeedForwardExperts(8, hidden_units=32),
    ...         activation="sigmoid",
    ...     ),
    ... )
    >>> source, target = np.ones((2, 5), "int32"), np.ones((2, 4), "int32")
    >>> model((source, target)).shape.as_list()
    [2, 4, 100]

    Reference:
        Shazeer et al. 2017, sections 5.3 and 5.4, appendix E; Wu et al. 2016,
        "Google's neural machine translation system".
    """

    def __init__(
        self,
        vocabulary_size: int,
        units: int = 512,
        *,
        encoder_middle: keras.layers.Layer | Sequence[keras.layers.Layer] | None = None,
        decoder_middle: keras.layers.Layer | Sequence[keras.layers.Layer] | None = None,
        lstm_units: int | None = None,
        encoder_lstms: int = 3,
        decoder_lstms: int = 2,
        middle_after: Sequence[int] = (2, 1),
        dropout: float = 0.4,
        vocabulary: SubwordVocabulary | None = None,
        name: str = "moe_translator",
        **kwargs: Any,
    ):
        vocabulary_size = checks.verify_positive_int(vocabulary_size, "vocabulary_size")
        units = checks.verify_positive_int(units, "units")
        if lstm_units is not None:
            lstm_units = checks.verify_positive_int(lstm_units, "lstm_units")
        middle_after = verify_stack(encoder_lstms, decoder_lstms, middle_after)
        dropout = checks.verify_rate(dropout, "dropout")
        verify_vocabulary(vocabulary, vocabulary_size)
        super().__init__(name=name, **kwargs)
        self.vocabulary_size = vocabulary_size
        self.units = units
        self.lstm_units = lstm_units
        self.encoder_lstms = int(encoder_lstms)
        self.decoder_lstms = int(decoder_lstms)
        self.middle_after = middle_after
        self.dropout = dropout
        self.vocabulary = vocabulary
        self.encoder_middle = as_middle(encoder_middle, "encoder_middle")
        self.decoder_middle = as_middle(decoder_middle, "decoder_middle")
        verify_distinct(self.encoder_middle, self.decoder_middle)
        self.source_embedding = self._make_embedding("source_embedding")
        self.target_embedding = self._make_embedding("target_embedding")
        policy = self.dtype_policy
        self.encoder = [
            make_lstm(units, lstm_units, f"encoder_lstm_{i}", policy)
            for i in range(encoder_lstms)
        ]
        first = AttentionLSTM(
            make_cell(units, lstm_units, policy), name="decoder_lstm_0", dtype=policy
        )
        others = [
            make_lstm(units, lstm_units, f"decoder_lstm_{i}", policy)
            for i in range(1, decoder_lstms)
        ]
        self.decoder = [first, *others]
        self.encoder[middle_after[0] : middle_after[0]] = self.encoder_middle
        self.decoder[middle_after[1] : middle_after[1]] = self.decoder_middle
        configs.hold(self, *self.encoder_middle, *self.decoder_middle)
        track_entries(self, "encoder")
        track_entries(self, "decoder")
        self.encoder_dropouts = self._make_dropouts(self.encoder)
        self.decoder_dropouts = self._make_dropouts(self.decoder)
        self.softmax = WordScores(
            vocabulary_size,
            bias_initializer=_BiasWithoutPadding(),
            dtype=at_least_float32(self.compute_dtype).name,
            name="softmax",
        )
        self._searches = TracedFunctions()

    def _make_embedding(self, name):
        return Embedding(
            self.vocabulary_size, self.units, name=name, dtype=self.dtype_policy
        )

    def _make_dropouts(self, layers):
        return [
            Dropout(self.dropout, dtype=self.dtype_policy)
            for _ in range(len(layers) + 1)
        ]

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixtures, those of the encoder first."""
        return mixtures_of([*self.encoder_middle, *self.decoder_middle])

    def build(self, input_shape):
        shape = (None, None, self.units)
        self.source_embedding.build((None, None))
        self.target_embedding.build((None, None))
        for dropout in (*self.encoder_dropouts, *self.decoder_dropouts):
            dropout.build(shape)
        for layer in (*self.encoder, *self.decoder):
            if not layer.built:
                shapes = (
                    (shape, shape) if isinstance(layer, AttentionLSTM) else (shape,)
                )
                layer.build(*shapes)
            if isinstance(layer, MoE):
                verify_width(layer, self.units)
        self.softmax.build(shape)
        self.built = True

    def call(self, inputs, training=None):
        source, target_inputs = split_inputs(inputs, self.vocabulary_size)
        checks.verify_shape(
            [source.shape[0], None],
            "a row for each of source",
            target_inputs=target_inputs,
        )
        memory, memory_mask = self.encode(source, training=training)
        state = self.initial_state(tf.shape(target_inputs)[0])
        return self.decode(target_inputs, memory, memory_mask, state, training)[0]

    def compute_mask(self, inputs, previous_mask=None):
        return keras.ops.not_equal(
            split_inputs(inputs, self.vocabulary_size)[1], PAD_ID
        )

    def encode(self, source, training=None):
        """What the decoder attends to.

        Args:
            source: Int tensor `(batch, length)`.
            training: Bool. Defaults to `None`.

        Returns:
            memory: `(batch, length, units)`.
            memory_mask: `(batch, length)` bool, False for padding.
        """
        mask = tf.not_equal(source, PAD_ID)
        hidden = self.source_embedding(source)
        hidden = self.encoder_dropouts[0](hidden, training=training)
        for layer, dropout in zip(self.encoder, self.encoder_dropouts[1:], strict=True):
            # The recurrences take no mask: padding comes after the sentence, where
            # it changes no earlier output.
            output = _run(layer, hidden, mask, training)
            hidden = hidden + dropout(output, training=training)
        return hidden, mask

    def decode(self, target_inputs, memory, memory_mask, state, training=None):
        """Logits of the next tokens, and the states to go on with.

        The same for all steps at once and for one step after the other.

        Args:
            target_inputs: Int tensor `(batch, length)`.
            memory: From `encode`; its batch may be a divisor of that of the
                inputs, see `AttentionLSTM`.
            memory_mask: From `encode`.
            state: From `initial_state` or an earlier call.
            training: Bool. Defaults to `None`.

        Returns:
            logits: `(batch, length, vocabulary_size)`.
            state: The states after the last step.
        """
        mask = tf.not_equal(target_inputs, PAD_ID)
        hidden = self.target_embedding(target_inputs)
        hidden = self.decoder_dropouts[0](hidden, training=training)
        state = iter(state)
        next_state = []
        for layer, dropout in zip(self.decoder, self.decoder_dropouts[1:], strict=True):
            if isinstance(layer, AttentionLSTM):
                output, layer_state = layer(
                    hidden,
                    memory,
                    memory_mask=memory_mask,
                    initial_state=next(state),
                    training=training,
                )
                next_state.append(layer_state)
            elif isinstance(layer, keras.layers.RNN):
                output, *layer_state = layer(
                    hidden, initial_state=next(state), training=training
                )
                next_state.append(layer_state)
            else:
                output = _run(layer, hidden, mask, training)
            hidden = hidden + dropout(output, training=training)
        return self.softmax(hidden), next_state

    def initial_state(self, batch_size):
        """Zero states of the decoder.

        Args:
            batch_size: Int or scalar int tensor.

        Returns:
            For each LSTM of the decoder the list of its states,
            `(batch_size, state units)`.
        """
        recurrent = (AttentionLSTM, keras.layers.RNN)
        layers = [layer for layer in self.decoder if isinstance(layer, recurrent)]
        return zero_states(layers, batch_size, self.compute_dtype)

    def attention(self, source, target_inputs) -> np.ndarray:
        """How much of each source position every step of the decoder took.

        Args:
            source: Int array `(batch, source length)`.
            target_inputs: Int array `(batch, target length)`.

        Returns:
            `(batch, target length, source length)`, rows sum to 1.
        """
        source, target_inputs = self._verified(source, target_inputs)
        memory, mask = self.encode(source, training=False)
        hidden = self.target_embedding(target_inputs)
        first = self.decoder[0]
        outputs, _ = first(hidden, memory, memory_mask=mask)
        return first.attention_weights(outputs, memory, mask).numpy()

    def routing(self, source, target_inputs):
        """Which experts take each token, in inference.

        Args:
            source: Int array `(batch, source length)`.
            target_inputs: Int array `(batch, target length)`.

        Returns:
            For each mixture, under its layer's name: expert indices and gates,
            both `(batch, length, k)`, as `MoELanguageModel.routing`.
        """
        source, target_inputs = self._verified(source, target_inputs)
        with recorded_routing(self.moe_layers) as records:
            memory, mask = self.encode(source, training=False)
            state = self.initial_state(target_inputs.shape[0])
            self.decode(target_inputs, memory, mask, state, training=False)
        return routing_arrays(records)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "units": self.units,
            "encoder_middle": configs.serialize_all(self, self.encoder_middle),
            "decoder_middle": configs.serialize_all(self, self.decoder_middle),
            "lstm_units": self.lstm_units,
            "encoder_lstms": self.encoder_lstms,
            "decoder_lstms": self.decoder_lstms,
            "middle_after": list(self.middle_after),
            "dropout": self.dropout,
            "vocabulary": self.vocabulary and serialize(self.vocabulary),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        checks.verify_config(cls, config)
        parts = {
            side: configs.deserialize_all(config.get(side), custom_objects)
            for side in ("encoder_middle", "decoder_middle")
        }
        parts["vocabulary"] = keras.saving.deserialize_keras_object(
            config.get("vocabulary"), custom_objects
        )
        return cls(**{**config, **parts})


def _run(layer, hidden, mask, training):
    if isinstance(layer, MoE):
        return layer(hidden, mask=mask, training=training)
    output = layer(hidden, training=training)
    return output[0] if isinstance(layer, keras.layers.RNN) else output
