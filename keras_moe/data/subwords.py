"""Subwords shared by all languages, learnt by sentencepiece, applied in the graph."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.vocabulary import EOS, EOS_ID, PAD, PAD_ID, RESERVED, UNK, UNK_ID


def language_token(language: str) -> str:
    """The piece that asks for a translation into `language`."""
    return f"<2{language}>"


@keras.saving.register_keras_serializable(package="keras_moe")
class SubwordVocabulary:
    """Subwords and their ids, and a token for every target language.

    Ids 0, 1 and 2 are `<pad>`, `<unk>` and `<eos>`, as in `Vocabulary`; after them
    come the tokens `<2fr>`, `<2de>`, ... that ask for a language. They are control
    symbols: no text contains them. Everything that maps text to ids or back is a
    TensorFlow op, so a model exported with its vocabulary takes and gives strings.

    Args:
        model: Bytes of a sentencepiece model, or their base64 as str.
        languages: Target languages, in the order of their tokens.

    Raises:
        ImportError: tensorflow-text is not installed.
        ValueError: `model` has other reserved ids, or no token for a language.

    Example:

    >>> texts = ["a cat sat on a mat", "the cat saw the mat", "a mat is a mat"]
    >>> vocabulary = keras_moe.data.SubwordVocabulary.learn(
    ...     texts, 40, ["fr"], byte_fallback=False
    ... )
    >>> ids = vocabulary.encode_target(["the cat sat"])
    >>> int(ids[0, -1]) == vocabulary.eos_id
    True
    >>> vocabulary.decode(ids).numpy()[0].decode()
    'the cat sat'

    Reference:
        Kudo and Richardson 2018, "SentencePiece"; Johnson et al. 2016, "Google's
        multilingual neural machine translation system".
    """

    pad_id = PAD_ID
    eos_id = EOS_ID

    def __init__(self, model: bytes | str, languages: Sequence[str]):
        try:
            import tensorflow_text
        except ImportError as error:
            raise ImportError(
                "SubwordVocabulary needs tensorflow-text. Install keras-moe[translation]."
            ) from error
        self.model = base64.b64decode(model) if isinstance(model, str) else bytes(model)
        self.languages = tuple(checks.verify_texts(languages, "languages"))

        # A tokenizer of tensorflow-text lives as long as the kernel that made it,
        # and `keras.utils.set_random_seed` clears the kernels of eager ops. Made
        # within a function it is made anew whenever the function is, and a
        # SavedModel has it in its graph.
        def tokenizer():
            return tensorflow_text.SentencepieceTokenizer(self.model, out_type=tf.int32)

        def in_graph(function, spec):
            return tf.function(function, input_signature=[spec], autograph=False)

        ids = tf.TensorSpec([None], tf.int32)
        self._tokenize = in_graph(
            lambda texts: tokenizer().tokenize(texts), tf.TensorSpec([None], tf.string)
        )
        self._detokenize = in_graph(
            lambda ids: tokenizer().detokenize(ids),
            tf.RaggedTensorSpec([None, None], tf.int32),
        )
        self._pieces = in_graph(lambda ids: tokenizer().id_to_string(ids), ids)
        self._size = int(
            tf.function(lambda: tokenizer().vocab_size(), autograph=False)()
        )
        wanted = [*RESERVED, *map(language_token, self.languages)]
        found = [self.piece(i) for i in range(min(len(wanted), self._size))]
        if found != wanted:
            raise ValueError(
                "`model` must begin with the pieces of `languages`. Received: pieces "
                f"{found}, expected {wanted}. Make it with `SubwordVocabulary.learn`."
            )

    @classmethod
    def learn(
        cls,
        texts: Iterable[str],
        size: int,
        languages: Sequence[str],
        *,
        byte_fallback: bool = True,
        max_sentences: int = 500_000,
    ) -> "SubwordVocabulary":
        """Learns subwords from text.

        Args:
            texts: Sentences of all languages; a generator will do.
            size: Int. Number of pieces, at most: little text may give fewer.
            languages: Target languages.
            byte_fallback: Bool. Whether characters that the text does not have
                become bytes (256 more pieces) and not `<unk>`. Defaults to `True`.
            max_sentences: Int. Learns from a sample of so many. Defaults to
                `500000`.

        Returns:
            A `SubwordVocabulary`.

        Raises:
            ImportError: sentencepiece or tensorflow-text is not installed.
            ValueError: `size` is too small, there is no text, or a language is
                named twice.

        Reference:
            Kudo 2018, "Subword regularization" (the unigram model).
        """
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                "Learning subwords needs sentencepiece. Install keras-moe[translation]."
            ) from error
        languages = checks.verify_texts(languages, "languages")
        checks.verify_int(max_sentences, "max_sentences")
        if isinstance(texts, str | bytes):
            checks.verify_texts(texts, "texts")  # a generator is not gone through
        if len(set(languages)) != len(languages):
            raise ValueError(
                f"`languages` must be distinct. Received: languages={languages}. Name "
                "each once."
            )
        least = len(RESERVED) + len(languages) + (256 if byte_fallback else 0) + 1
        checks.verify_int(size, "size", least)
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=written,
                vocab_size=size,
                hard_vocab_limit=False,
                model_type="unigram",
                character_coverage=0.9999 if byte_fallback else 1.0,
                byte_fallback=byte_fallback,
                pad_id=PAD_ID,
                unk_id=UNK_ID,
                eos_id=EOS_ID,
                bos_id=-1,
                pad_piece=PAD,
                unk_piece=UNK,
                eos_piece=EOS,
                control_symbols=[language_token(name) for name in languages],
                input_sentence_size=max_sentences,
                shuffle_input_sentence=True,
                num_threads=1,  # the same text gives the same pieces
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"sentencepiece could not learn from `texts`. Received: size={size}: "
                f"{error}. Give it more text, or lower `size`."
            ) from error
        return cls(written.getvalue(), languages)

    def __len__(self) -> int:
        return self._size

    def piece(self, index: int) -> str:
        """The piece of an id."""
        return self.pieces([index])[0]

    def pieces(self, ids) -> list[str]:
        """The pieces of ids, for looking at.

        Args:
            ids: `(n,)` int.

        Returns:
            List of n str; a blank within a text is `▁`.

        Raises:
            ValueError: `ids` is not one row, or outside the vocabulary.
        """
        array = np.asarray(checks.verify_ids(ids, "ids", len(self)))
        checks.verify_shape([None], "one row", ids=array)
        return [
            piece.decode() for piece in self._pieces(array.astype(np.int32)).numpy()
        ]

    def language_ids(self, languages) -> tf.Tensor:
        """Ids of the tokens of target languages, in the graph.

        Args:
            languages: `(n,)` string tensor.

        Returns:
            `(n,)` int32.

        Raises:
            tf.errors.InvalidArgumentError: A language is not one of `languages`.
        """
        languages = tf.convert_to_tensor(languages, tf.string)
        same = tf.equal(languages[:, tf.newaxis], tf.constant(self.languages))
        known = tf.debugging.Assert(
            tf.reduce_all(tf.reduce_any(same, axis=1)),
            [
                f"`languages` must be among {', '.join(self.languages)}. Received:",
                languages,
            ],
        )
        # Eagerly an assertion is no op to wait for.
        with tf.control_dependencies([] if known is None else [known]):
            index = tf.argmax(same, axis=1, output_type=tf.int32)
        return index + len(RESERVED)

    def encode_source(self, texts, languages) -> tf.RaggedTensor:
        """Ids of source sentences: language token, pieces, `<eos>`.

        Args:
            texts: `(n,)` string tensor.
            languages: `(n,)` string tensor, what to translate into.

        Returns:
            `(n, None)` int32, ragged.

        Raises:
            tf.errors.InvalidArgumentError: A language is not one of `languages`.
        """
        texts, languages = (
            tf.convert_to_tensor(each, tf.string) for each in (texts, languages)
        )
        checks.verify_shape(texts.shape, "one for each text", languages=languages)
        pieces = self.encode_target(texts)
        return tf.concat([self.language_ids(languages)[:, tf.newaxis], pieces], axis=1)

    def encode_target(self, texts) -> tf.RaggedTensor:
        """Ids of target sentences: pieces, `<eos>`.

        Args:
            texts: `(n,)` string tensor.

        Returns:
            `(n, None)` int32, ragged.
        """
        texts = tf.convert_to_tensor(texts, tf.string)
        checks.verify_shape([None], "a list of sentences", texts=texts)
        ids = self._tokenize(texts)
        end = tf.fill([ids.nrows(), 1], self.eos_id)
        return tf.concat([ids, tf.cast(end, tf.int32)], axis=1)

    def decode(self, ids) -> tf.Tensor:
        """Text of ids, up to the first `<eos>`.

        Args:
            ids: `(n, length)` int32, dense or ragged; padding is dropped.

        Returns:
            `(n,)` string tensor.
        """
        dense = ids
        if isinstance(ids, tf.RaggedTensor):
            dense = ids.to_tensor(self.pad_id)
        dense = tf.cast(checks.verify_ids(dense, "ids", len(self)), tf.int32)
        checks.verify_shape([None, None], "rows of ids", ids=dense)
        ended = tf.cumsum(tf.cast(tf.equal(dense, self.eos_id), tf.int32), axis=1) > 0
        keep = tf.logical_not(ended) & tf.not_equal(dense, self.pad_id)
        return self._detokenize(tf.ragged.boolean_mask(dense, keep))

    def get_config(self) -> dict[str, Any]:
        """All there is of the vocabulary, for JSON."""
        return {
            "model": base64.b64encode(self.model).decode(),
            "languages": list(self.languages),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SubwordVocabulary":
        """A vocabulary from its `get_config`."""
        checks.verify_config(cls, config)
        return cls(**config)
