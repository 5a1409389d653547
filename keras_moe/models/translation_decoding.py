"""Decoding and scoring of the translation model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.translation import target_inputs
from keras_moe.data.vocabulary import EOS_ID, PAD_ID
from keras_moe.models.beams import beam_search
from keras_moe.models.parts import TracedFunctions
from keras_moe.models.translation_checks import as_texts, verify_decoding, verify_ids


class Decoding:
    """What `MoETranslator` does with `encode`, `decode` and `initial_state`."""

    vocabulary: Any
    vocabulary_size: int
    compute_dtype: str
    encode: Any
    decode: Any
    initial_state: Any
    _searches: TracedFunctions

    def search(
        self,
        source,
        *,
        num_beams: int = 4,
        length_penalty: float = 0.2,
        max_length: int = 100,
    ):
        """Translations of token ids by beam search, inside a graph or eagerly.

        Args:
            source: Int tensor `(batch, length)`, padded at the end.
            num_beams: Int. Hypotheses kept; 1 is greedy. Defaults to `4`.
            length_penalty: Float. See `beam_search`. Defaults to `0.2`.
            max_length: Int. Most tokens, `<eos>` included. Defaults to `100`.

        Returns:
            tokens: `(batch, num_beams, length)` int32, the best first; 0 after
                `<eos>`.
            scores: `(batch, num_beams)` float32, `log P / lp`; `log P` alone of a
                sentence of which no hypothesis ended within `max_length`.

        Raises:
            ImportError: tf-models-official is not installed.
            ValueError: An argument is out of range.
        """
        verify_decoding(num_beams, length_penalty, max_length)
        source = verify_ids(source, "source", self.vocabulary_size)
        memory, memory_mask = self.encode(source, training=False)
        batch = tf.shape(source)[0]
        state = self.initial_state(batch)

        def step(tokens, flat):
            # The hypotheses of a sentence follow each other and share its memory.
            packed = tf.nest.pack_sequence_as(state, [flat[k] for k in sorted(flat)])
            packed = tf.nest.map_structure(
                lambda s: tf.cast(s, self.compute_dtype), packed
            )
            logits, packed = self.decode(
                tokens[:, tf.newaxis], memory, memory_mask, packed, training=False
            )
            return tf.cast(logits[:, 0], tf.float32), _flat(packed)

        tokens, scores = beam_search(
            step,
            tf.fill([batch], EOS_ID),
            _flat(state),
            vocabulary_size=self.vocabulary_size,
            eos_id=EOS_ID,
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_length=max_length,
        )
        if num_beams == 1:
            log_prob, length = self._log_prob(tokens[:, 0], memory, memory_mask)
            ended = tf.reduce_any(tf.equal(tokens[:, 0], EOS_ID), axis=1)
            penalty = tf.pow((5.0 + length) / 6.0, length_penalty)
            # As the search does it: what was cut off keeps its log P.
            scores = tf.where(ended, log_prob / penalty, log_prob)[:, tf.newaxis]
        return tokens, scores

    def score(self, source, targets):
        """Log probabilities of given translations, in one pass.

        Args:
            source: Int tensor `(batch, source length)`.
            targets: Int tensor `(batch, target length)`, with `<eos>` last.

        Returns:
            `(batch,)` float32: the sum over the tokens, `<eos>` included.
        """
        source, targets = self._verified(source, targets)
        memory, mask = self.encode(source, training=False)
        return self._log_prob(targets, memory, mask)[0]

    def _verified(self, source, targets):
        """Both as tensors of ids, with as many rows."""
        source, targets = (
            verify_ids(ids, name, self.vocabulary_size)
            for ids, name in ((source, "source"), (targets, "targets"))
        )
        rows = [source.shape[0], None]
        checks.verify_shape(rows, "a row for each of `source`", targets=targets)
        return source, targets

    def _log_prob(self, targets, memory, memory_mask):
        """`(batch,)` log probabilities and lengths, float32."""
        targets = tf.cast(targets, tf.int32)
        real = tf.cast(tf.not_equal(targets, PAD_ID), tf.float32)
        before = target_inputs(targets)
        state = self.initial_state(tf.shape(targets)[0])
        logits, _ = self.decode(before, memory, memory_mask, state, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=targets, logits=tf.cast(logits, tf.float32)
        )
        return -tf.reduce_sum(losses * real, axis=1), tf.reduce_sum(real, axis=1)

    def translate_tensors(self, texts, languages, **options):
        """Translations of strings, inside a graph or eagerly.

        Args:
            texts: `(batch,)` string tensor.
            languages: `(batch,)` string tensor, what to translate into.
            **options: Of `search`.

        Returns:
            translations: `(batch,)` string tensor.
            scores: `(batch,)` float32, `log P / lp` of each.

        Raises:
            ValueError: The model has no vocabulary.
        """
        vocabulary = self._vocabulary()
        source = vocabulary.encode_source(texts, languages).to_tensor()
        tokens, scores = self.search(source, **options)
        return vocabulary.decode(tokens[:, 0]), scores[:, 0]

    def translate(
        self,
        texts: str | Sequence[str],
        target_language: str | Sequence[str] | None = None,
        *,
        batch_size: int = 64,
        **options: Any,
    ) -> Any:
        """Translates text.

        Args:
            texts: Str or list of str.
            target_language: Str, or one for each text. None takes the only one
                that the vocabulary has. Defaults to `None`.
            batch_size: Int. Sentences of a batch. Defaults to `64`.
            **options: Of `search`: `num_beams`, `length_penalty`, `max_length`.

        Returns:
            Str or list of str.

        Raises:
            ImportError: tf-models-official is not installed.
            ValueError: The model has no vocabulary, a language is unknown, or an
                option is out of range.
        """
        vocabulary = self._vocabulary()
        batch_size = checks.verify_positive_int(batch_size, "batch_size")
        verify_decoding(**options)
        listed, languages = as_texts(texts, target_language, vocabulary.languages)
        if not listed:
            return []
        key = tuple(sorted(options.items()))

        def trace():
            return tf.function(
                lambda t, n: self.translate_tensors(t, n, **options)[0],
                input_signature=[tf.TensorSpec([None], tf.string)] * 2,
                autograph=False,
            )

        search = self._searches.get(key, trace)
        # Sentences of about equal length together.
        order = np.argsort([len(text) for text in listed], kind="stable")
        found: np.ndarray = np.empty(len(listed), object)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [[column[i] for i in rows] for column in (listed, languages)]
            found[rows] = search(*map(tf.constant, batch)).numpy()
        decoded = [text.decode() for text in found]
        return decoded[0] if isinstance(texts, str) else decoded

    def _vocabulary(self):
        if self.vocabulary is None:
            raise ValueError(
                "`vocabulary` must be given to the model to translate text. Received: "
                "vocabulary=None. Make the model with one, or use `search` on ids."
            )
        return self.vocabulary


def _flat(state):
    """The states as the search wants them: a dict of float32 tensors."""
    leaves = tf.nest.flatten(state)
    return {f"{i:03d}": tf.cast(s, tf.float32) for i, s in enumerate(leaves)}
