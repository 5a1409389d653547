"""Tokens, their ids and their counts."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from keras_moe import checks, writing

#: Token that fills a row up, always id 0.
PAD = "<pad>"
#: Token of everything the vocabulary does not know.
UNK = "<unk>"
#: Token at the end of every line.
EOS = "<eos>"
RESERVED = (PAD, UNK, EOS)
PAD_ID, UNK_ID, EOS_ID = range(len(RESERVED))

# Words with inner apostrophes, decimal numbers with inner points or commas, and
# any other visible character by itself. `WORD_PATTERN` is for RE2, that is for
# the inside of a TensorFlow graph. Python's `re` knows no Unicode classes and
# RE2 no `\w` beyond ASCII, so the same language is written twice; a test compares
# the two on every character of Unicode.
_LETTER = r"[\pL\p{No}\p{Nl}]"
_BLANKS = r"\s\pZ\x0b\x1c-\x1f\x{85}"
_VISIBLE = rf"[^{_BLANKS}]"
#: What stands between tokens, for RE2.
BLANK_PATTERN = rf"[{_BLANKS}]+"
#: A token of the tokenizer "words", for RE2.
WORD_PATTERN = rf"{_LETTER}+(?:['’]{_LETTER}+)*|\p{{Nd}}+(?:[.,]\p{{Nd}}+)*|{_VISIBLE}"
_WORD_PATTERN_PYTHON = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+(?:[.,]\d+)*|\S")
#: Names of the tokenizers, see `tokenize`.
TOKENIZERS = ("words", "whitespace")

_LINE = re.compile(r"(.*)\t([0-9]+)\n", re.DOTALL)
#: Pairs of pattern and replacement that turn joined tokens into text, applied to each
#: line in this order, in Python and in a TensorFlow graph alike.
DETOKENIZATION_RULES = (
    (r" *@([-,.])@ *", r"\1"),  # WikiText: 25 @,@ 000
    (r" ('(?:s|re|ve|ll|d|m)|n't)\b", r"\1"),  # Penn Treebank: do n't
    (r" +([,.;:!?’”)\]])", r"\1"),
    (r"([“‘(\[]) +", r"\1"),
    (r" *- *", "-"),
    (r'" *([^"]*?) *("|$)', r'"\1\2'),
)
# In RE2 a word's end is that of ASCII.
_DETOKENIZER = [(re.compile(p, re.ASCII), by) for p, by in DETOKENIZATION_RULES]


def tokenize(line: str, tokenizer: str) -> list[str]:
    """Splits a line of text into tokens.

    Args:
        line: Str. A line of text.
        tokenizer: Str. `"words"` for raw text: words (with inner apostrophes, as in
            don't), numbers, and every other visible character by itself; case
            is kept. `"whitespace"` for text that is tokenized already.

    Returns:
        List of tokens.

    Raises:
        ValueError: `tokenizer` is unknown.

    Example:

    >>> keras_moe.data.tokenize("I don't, Mr. Bennet.", "words")
    ['I', "don't", ',', 'Mr', '.', 'Bennet', '.']
    """
    if tokenizer == "words":
        return _WORD_PATTERN_PYTHON.findall(line)
    if tokenizer == "whitespace":
        return line.split()
    raise ValueError(
        f"`tokenizer` must be one of {TOKENIZERS}. Received: tokenizer={tokenizer!r}. "
        "Pass 'words' for raw text, 'whitespace' for text that is tokenized already."
    )


class Vocabulary:
    """Token ids with counts. 0 is `<pad>`, 1 is `<unk>`, 2 is `<eos>`.

    In a text, a literal `<unk>` or `<eos>` has the reserved id; a literal `<pad>`
    is an unknown word, never padding.

    Args:
        tokens: List of str. All tokens in the order of their ids, the reserved
            three first. A token holds no line feed.
        counts: `(len(tokens),)` int. Occurrences of each in the text that the
            vocabulary was learnt from.

    Raises:
        ValueError: The reserved tokens are not at the front, a token stands
            twice or holds a line feed, a count is negative, or the lengths
            differ.

    Example:

    >>> lines = [["to", "be", "or", "not", "to", "be"], ["be", "it", "so"]]
    >>> vocabulary = keras_moe.data.Vocabulary.from_tokens(lines, min_count=2)
    >>> vocabulary.tokens, vocabulary.counts.tolist()
    (['<pad>', '<unk>', '<eos>', 'be', 'to'], [0, 4, 2, 3, 2])
    >>> vocabulary.encode(["to", "see", "<eos>"]).tolist()
    [4, 1, 2]
    """

    def __init__(self, tokens: Sequence[str], counts: Sequence[int] | np.ndarray):
        tokens = checks.verify_texts(tokens, "tokens")
        if tuple(tokens[:3]) != RESERVED:
            raise ValueError(
                f"`tokens` must begin with {RESERVED}. Received: {tokens[:3]}. "
                "Put the reserved tokens first."
            )
        if len(tokens) != len(counts):
            raise ValueError(
                "`tokens` and `counts` must have the same length. Received: "
                f"{len(tokens)} tokens, {len(counts)} counts. Give one count a token."
            )
        self.tokens = tokens
        self.counts = np.asarray(checks.verify_ids(counts, "counts"), np.int64)
        if self.counts.min() < 0:
            raise ValueError(
                "`counts` must be at least 0. Received: a count of "
                f"{self.counts.min()} for {tokens[self.counts.argmin()]!r}. "
                "Count occurrences."
            )
        self._ids = {token: i for i, token in enumerate(tokens)}
        if len(self._ids) != len(tokens):
            twice = [token for token, n in Counter(tokens).items() if n > 1][:3]
            raise ValueError(
                f"`tokens` must be different. Received more than once: {twice}. "
                "Drop the second ones."
            )
        broken = [token for token in tokens if "\n" in token][:3]
        if broken:
            raise ValueError(
                "A token must not hold a line feed, for `save` writes one token a "
                f"line. Received: {broken}. Split the text into lines first."
            )
        self._ids[PAD] = UNK_ID

    @classmethod
    def from_tokens(
        cls,
        tokens: Iterable[Sequence[str]] | Counter[str],
        *,
        max_size: int | None = None,
        min_count: int = 1,
    ) -> "Vocabulary":
        """Learns a vocabulary: frequent tokens get small ids, ties alphabetically.

        The alphabet is that of Unicode code points, so that the result does not
        depend on the order of the text.

        Args:
            tokens: The tokens of each line, a list of str a line, or a `Counter`
                of all tokens in which `"<eos>"` counts the lines.
            max_size: Int or None. Most ids, the reserved three included.
                Defaults to `None`: no limit.
            min_count: Int. Tokens that occur less often become `<unk>`. Defaults
                to `1`.

        Returns:
            A `Vocabulary`. `<unk>` counts the words left out and the literal
            `<unk>` (and `<pad>`) of the text, `<eos>` the lines and the literal
            `<eos>`.

        Raises:
            ValueError: `max_size` leaves no room for a word, `min_count` is
                below 1, or a line is a str, not a list of them.
        """
        checks.verify_int(min_count, "min_count", 1)
        if max_size is not None:
            checks.verify_int(max_size, "max_size", len(RESERVED) + 1)
        counter: Counter[str] = Counter()
        if isinstance(tokens, Counter):
            counter.update(tokens)
        else:
            for line in tokens:
                counter.update(checks.verify_texts(line, "tokens"))
                counter[EOS] += 1
        eos = counter.pop(EOS, 0)
        unknown = counter.pop(UNK, 0) + counter.pop(PAD, 0)
        ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
        limit = None if max_size is None else max_size - len(RESERVED)
        kept = [item for item in ranked[:limit] if item[1] >= min_count]
        unknown += sum(counter.values()) - sum(count for _, count in kept)
        return cls(
            [*RESERVED, *(token for token, _ in kept)],
            [0, unknown, eos, *(count for _, count in kept)],
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vocabulary)
            and self.tokens == other.tokens
            and np.array_equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]

    def encode(self, tokens: Iterable[str]) -> np.ndarray:
        """Ids of tokens.

        Args:
            tokens: List of str.

        Returns:
            `(len(tokens),)` int32; unknown tokens become 1.

        Raises:
            ValueError: `tokens` is a str, not a list of them.
        """
        get = self._ids.get
        listed = checks.verify_texts(tokens, "tokens")
        return np.fromiter((get(token, UNK_ID) for token in listed), np.int32)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Tokens of ids.

        Args:
            ids: `(n,)` int.

        Returns:
            List of n str.

        Raises:
            ValueError: `ids` is not one-dimensional, or an id is outside the
                vocabulary.
        """
        return [self.tokens[i] for i in self._verify_ids(ids, least=0)]

    def to_text(self, ids: Iterable[int]) -> str:
        """Readable text: `<eos>` ends a line, punctuation stands where it should.

        Rules of thumb, made for English: no blank before a closing mark, after
        an opening one or around a hyphen; straight double quotes open and close
        in turn, afresh on every line; the parts of `do n't` and `@-@` of
        tokenized corpora are joined. Padding is dropped.

        Args:
            ids: `(n,)` int.

        Returns:
            Str, without line feeds at its ends.

        Raises:
            ValueError: As `decode`.

        Example:

        >>> words = '" Well - a - day ! " said she .'.split()
        >>> vocabulary = keras_moe.data.Vocabulary.from_tokens([words])
        >>> vocabulary.to_text(vocabulary.encode(words))
        '"Well-a-day!" said she.'
        """
        text = " ".join("\n" if t == EOS else t for t in self.decode(ids) if t != PAD)
        lines = text.split("\n")
        for pattern, replacement in _DETOKENIZER:
            lines = [pattern.sub(replacement, line) for line in lines]
        return "\n".join(line.strip(" ") for line in lines).strip("\n")

    def unigram_log_probs(self) -> np.ndarray:
        """Log frequencies of the training text, with one added to every count.

        Returns:
            `(len,)` float64, natural logarithms. The probabilities of all ids
            but `<pad>` sum to 1; that of `<pad>` is 0, its logarithm `-inf`.
        """
        smoothed = self.counts.astype(np.float64) + 1.0
        smoothed[0] = 0.0
        with np.errstate(divide="ignore"):
            return np.log(smoothed / smoothed.sum())

    def save(self, path: str | Path) -> None:
        """Writes one `token<TAB>count` a line, UTF-8, in the order of the ids.

        Args:
            path: Str or path of the file.
        """
        lines = [f"{t}\t{c}\n" for t, c in zip(self.tokens, self.counts, strict=True)]
        # Lone surrogates, as in file names, are no UTF-8 but must come back too.
        with writing.written_beside(path) as partial:
            partial.write_bytes("".join(lines).encode("utf-8", "surrogatepass"))

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads what `save` wrote.

        Args:
            path: Str or path of the file.

        Returns:
            An equal `Vocabulary`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A line is not `token<TAB>count`.
        """
        tokens, counts = [], []
        # Not splitlines(): tokens may hold other Unicode line separators.
        with open(path, encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            for number, line in enumerate(file, 1):
                match = _LINE.fullmatch(line)
                if not match:
                    raise ValueError(
                        f"A vocabulary file must hold token<TAB>count lines. Received: "
                        f"{line!r} in line {number} of {path}. Write it with `save`."
                    )
                tokens.append(match[1])
                counts.append(int(match[2]))
        return cls(tokens, counts)

    def _verify_ids(self, ids: Iterable[int], least: int) -> np.ndarray:
        ids = ids if hasattr(ids, "shape") else list(ids)
        array = np.asarray(checks.verify_ids(ids, "ids", len(self), least))
        checks.verify_shape([None], "of one dimension", ids=array)
        return array


def unigram_perplexity(vocabulary: Vocabulary, ids: Iterable[int]) -> float:
    """Perplexity of a stream under the frequencies of the training text.

    `exp(-mean(log p(id)))` with `p` from `Vocabulary.unigram_log_probs`: what a
    model has to beat that sees no context.

    Args:
        vocabulary: `Vocabulary`. Gives the counts; one is added to each.
        ids: `(n,)` int token ids, without padding.

    Returns:
        Float, at least 1.

    Raises:
        ValueError: `ids` is empty, holds padding, or an id is outside the
            vocabulary.

    Example:

    >>> corpus = keras_moe.data.load_text_corpus()
    >>> round(keras_moe.data.unigram_perplexity(corpus.vocabulary, corpus.test), 1)
    435.3
    """
    array = vocabulary._verify_ids(ids, least=1)
    if not array.size:
        raise ValueError(
            "`ids` must hold at least one token. Received: 0 tokens. Pass a stream "
            "such as `corpus.test`."
        )
    return float(np.exp(-vocabulary.unigram_log_probs()[array].mean()))
