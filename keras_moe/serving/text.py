"""Strings to token ids and back, by operations inside the graph."""

import itertools

import tensorflow as tf

from keras_moe import checks
from keras_moe.data import (
    BLANK_PATTERN,
    DETOKENIZATION_RULES,
    EOS,
    TOKENIZERS,
    UNK,
    WORD_PATTERN,
    Vocabulary,
)
from keras_moe.data.vocabulary import PAD_ID

# Characters that no text should have, and private ones.
_STAND_INS = (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))


class TextCodec:
    """A `Vocabulary` in the graph of an exported language model.

    Gives the ids of `keras_moe.data.tokenize` and `Vocabulary.encode`, and the
    text of `Vocabulary.to_text`, by operations of TensorFlow and TensorFlow
    Text. Bytes that are no UTF-8 become U+FFFD, one each.

    Args:
        vocabulary: A `keras_moe.data.Vocabulary`.
        tokenizer: Str. `"words"` or `"whitespace"`, as in
            `keras_moe.data.tokenize`. Defaults to `"words"`.

    Raises:
        ValueError: `tokenizer` is unknown.
        ImportError: tensorflow-text is not installed.

    Example:

    >>> lines = [["to", "be", "or", "not", "to", "be"]]
    >>> vocabulary = keras_moe.data.Vocabulary.from_tokens(lines)
    >>> codec = keras_moe.serving.TextCodec(vocabulary)
    >>> ids = codec.encode(["to be", "or\\nnot"])
    >>> ids.to_list()
    [[4, 3, 2], [6, 2, 5, 2]]
    >>> codec.decode(ids).numpy().tolist()
    [b'to be', b'or\\nnot']
    """

    def __init__(self, vocabulary: Vocabulary, tokenizer: str = "words"):
        checks.verify_choice(tokenizer, "tokenizer", TOKENIZERS)
        try:
            import tensorflow_text
        except ImportError as error:
            raise ImportError(
                "`text` needs tensorflow-text. Received: none installed. Run "
                "`pip install keras-moe[text]`, or export without `text`."
            ) from error
        self._split = tensorflow_text.regex_split
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self._tokens = [t.encode("utf-8", "surrogatepass") for t in vocabulary.tokens]
        # The split ends a text at a NUL: a character that no token has stands for it,
        # and another one for that.
        known = set().union(*vocabulary.tokens)
        self._nul, self._other = itertools.islice(
            (c for c in map(chr, _STAND_INS) if c not in known), 2
        )
        ids = vocabulary.encode(vocabulary.tokens)  # a literal <pad> is unknown
        self.table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                self._tokens, tf.constant(ids, tf.int32)
            ),
            default_value=int(vocabulary.encode([UNK])[0]),
        )
        self.end = int(vocabulary.encode([EOS])[0])

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Ids of texts.

        Args:
            texts: `(batch,)` string, UTF-8. Line feeds separate lines; one at
                the end counts for nothing.

        Returns:
            `(batch, None)` int32. Every line ends with `<eos>`, so that there
            is at least one id, also for an empty text.
        """
        texts = tf.strings.unicode_transcode(
            texts, "UTF-8", "UTF-8", errors="replace", replacement_char=0xFFFD
        )
        texts = tf.strings.regex_replace(texts, self._nul, self._other)
        texts = tf.strings.regex_replace(texts, r"\x00", self._nul)
        texts = tf.strings.regex_replace(texts, "\r?\n\\z", "")
        lines = tf.strings.split(texts, "\n")
        if self.tokenizer == "words":
            tokens = self._split(
                lines.flat_values, f"{WORD_PATTERN}|{BLANK_PATTERN}", WORD_PATTERN
            )
        else:
            tokens = self._split(lines.flat_values, BLANK_PATTERN)
        words = tf.strings.regex_replace(tokens.flat_values, self._nul, "\0")
        ids = tokens.with_flat_values(self.table.lookup(words))
        ends = tf.fill(tf.stack([tf.shape(lines.flat_values)[0], 1]), self.end)
        ids = tf.concat([ids, tf.RaggedTensor.from_tensor(ends)], axis=1)
        return lines.with_flat_values(ids).merge_dims(1, 2)

    def tokens(self, ids: tf.Tensor) -> tf.Tensor:
        """The tokens of ids, of any shape, as strings; padding is empty."""
        return tf.gather(tf.constant([b"", *self._tokens[1:]]), ids)

    def decode(self, ids: tf.RaggedTensor) -> tf.Tensor:
        """Readable text.

        Args:
            ids: `(batch, None)` int32; the last of them may be padding.

        Returns:
            `(batch,)` string; `<eos>` ends a line.
        """
        ids = tf.ragged.boolean_mask(ids, tf.not_equal(ids, PAD_ID))
        words = tf.where(
            tf.equal(ids.flat_values, self.end), b"\n", self.tokens(ids.flat_values)
        )
        texts = tf.strings.reduce_join(
            ids.with_flat_values(words), axis=-1, separator=" "
        )
        lines = tf.strings.split(texts, "\n")
        flat = lines.flat_values
        for pattern, replacement in (
            *DETOKENIZATION_RULES,
            ("^ +", ""),
            (" +$", ""),
        ):
            flat = tf.strings.regex_replace(flat, pattern, replacement)
        texts = tf.strings.reduce_join(
            lines.with_flat_values(flat), axis=-1, separator="\n"
        )
        return tf.strings.regex_replace(texts, r"\A\n+|\n+\z", "")
