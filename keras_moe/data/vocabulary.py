"""Tokens, their ids and their counts."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from keras_moe import checks

PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
RESERVED = (PAD, UNK, EOS)

# Words with inner apostrophes, decimal numbers with inner points or commas, and
# any other visible character by itself. Python's `re` knows no Unicode classes
# and RE2 (in a TensorFlow graph) no `\w` beyond ASCII, so the same language is
# written twice; a test compares the two.
_LETTER = r"[\pL\p{No}\p{Nl}]"
_VISIBLE = r"[^\s\pZ\x0b\x1c-\x1f\x{85}]"
WORD_PATTERN = rf"{_LETTER}+(?:['’]{_LETTER}+)*|\p{{Nd}}+(?:[.,]\p{{Nd}}+)*|{_VISIBLE}"
_WORD_PATTERN_PYTHON = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+(?:[.,]\d+)*|\S")
TOKENIZERS = ("words", "whitespace")


def tokenize(line: str, tokenizer: str) -> list[str]:
    """Splits a line of text into tokens.

    Args:
        line: A line of text.
        tokenizer: `"words"` for raw text: words (with inner apostrophes, as in
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
        f"`tokenizer` must be one of {TOKENIZERS}. Received: tokenizer={tokenizer!r}."
    )


class Vocabulary:
    """Token ids with counts. 0 is `<pad>`, 1 is `<unk>`, 2 is `<eos>`.

    Args:
        tokens: All tokens in the order of their ids, the reserved three first.
        counts: Occurrences of each in the text the vocabulary was learnt from.

    Raises:
        ValueError: The reserved tokens are not at the front, a token stands
            twice, or the lengths differ.
    """

    def __init__(self, tokens: Sequence[str], counts: Sequence[int]):
        tokens = list(tokens)
        if tuple(tokens[:3]) != RESERVED:
            raise ValueError(
                f"`tokens` must begin with {RESERVED}. Received: {tokens[:3]}."
            )
        if len(tokens) != len(counts):
            raise ValueError(
                "`tokens` and `counts` must have the same length. "
                f"Received: {len(tokens)} tokens, {len(counts)} counts."
            )
        self.tokens = tokens
        self.counts = np.asarray(counts, np.int64)
        self._ids = {token: i for i, token in enumerate(tokens)}
        if len(self._ids) != len(tokens):
            twice = [token for token, n in Counter(tokens).items() if n > 1][:3]
            raise ValueError(
                f"`tokens` must be different. Received more than once: {twice}."
            )
        # A literal "<pad>" in a text is an unknown word, never padding.
        self._ids[PAD] = 1

    @classmethod
    def learn(
        cls,
        lines: Iterable[Sequence[str]],
        *,
        max_size: int | None = None,
        min_count: int = 1,
    ) -> "Vocabulary":
        """Counts tokens; frequent ones get small ids, ties go alphabetically.

        Args:
            lines: Tokens of each line.
            max_size: Most ids, the reserved three included. None means no
                limit. Defaults to `None`.
            min_count: Tokens that occur less often become `<unk>`. Defaults to
                `1`.

        Returns:
            A `Vocabulary`. Words left out count as `<unk>`, lines as `<eos>`.

        Raises:
            ValueError: `max_size` leaves no room for a word, or `min_count` is
                below 1.
        """
        min_count = checks.verify_positive_int(min_count, "min_count")
        if max_size is not None and max_size <= len(RESERVED):
            raise ValueError(
                "The size of the vocabulary (`max_size`, `vocabulary_size`) must be "
                f"above the {len(RESERVED)} reserved ids. Received: {max_size}."
            )
        counter: Counter[str] = Counter()
        num_lines = 0
        for tokens in lines:
            counter.update(tokens)
            num_lines += 1
        num_lines += counter.pop(EOS, 0)
        unknown = counter.pop(UNK, 0) + counter.pop(PAD, 0)
        ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
        limit = None if max_size is None else max_size - len(RESERVED)
        kept = [item for item in ranked[:limit] if item[1] >= min_count]
        unknown += sum(counter.values()) - sum(count for _, count in kept)
        return cls(
            [*RESERVED, *(token for token, _ in kept)],
            [0, unknown, num_lines, *(count for _, count in kept)],
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other) -> bool:
        return (
            isinstance(other, Vocabulary)
            and self.tokens == other.tokens
            and np.array_equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]

    def encode(self, tokens: Iterable[str]) -> np.ndarray:
        """Ids of tokens, `(len,)` int32; unknown ones become 1."""
        get = self._ids.get
        return np.fromiter((get(token, 1) for token in tokens), np.int32)

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Tokens of ids.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        array = np.asarray(list(ids), np.int64)
        if array.size and not 0 <= array.min() <= array.max() < len(self):
            raise ValueError(
                f"`ids` must be within [0, {len(self)}). Received: ids from "
                f"{array.min()} to {array.max()}."
            )
        return [self.tokens[i] for i in array]

    def to_text(self, ids: Iterable[int]) -> str:
        """Readable text: `<eos>` ends a line, no blanks before punctuation."""
        text = " ".join("\n" if t == EOS else t for t in self.decode(ids) if t != PAD)
        text = re.sub(r" +([,.;:!?’)\]])", r"\1", text)
        text = re.sub(r"([(\[]) +", r"\1", text)
        # Straight quotes open and close in turn, afresh on every line.
        lines = [re.sub(r'" *([^"]*?) *("|$)', r'"\1\2', x) for x in text.split("\n")]
        return "\n".join(line.strip() for line in lines).strip()

    def unigram_log_probs(self) -> np.ndarray:
        """`(len,)` float64: log frequency with one added to every count.

        Padding has no probability (`-inf`).
        """
        smoothed = self.counts.astype(np.float64) + 1.0
        smoothed[0] = 0.0
        with np.errstate(divide="ignore"):
            return np.log(smoothed / smoothed.sum())

    def save(self, path: str | Path) -> None:
        """Writes one `token<TAB>count` a line, UTF-8."""
        lines = [f"{t}\t{c}\n" for t, c in zip(self.tokens, self.counts, strict=True)]
        Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Reads what `save` wrote.

        Raises:
            ValueError: A line is not `token<TAB>count`.
        """
        tokens, counts = [], []
        # Not splitlines(): tokens may hold other Unicode line separators.
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                token, tab, count = line.rstrip("\n").rpartition("\t")
                if not tab or not count.isdigit():
                    raise ValueError(
                        f"A vocabulary file must hold token<TAB>count lines. Received: "
                        f"{line!r} in line {number} of {path}."
                    )
                tokens.append(token)
                counts.append(int(count))
        return cls(tokens, counts)


def unigram_perplexity(vocabulary: Vocabulary, ids: np.ndarray) -> float:
    """Perplexity of a stream under the frequencies of the training text.

    Args:
        vocabulary: Gives the counts; one is added to each.
        ids: `(n,)` int token ids, without padding.

    Returns:
        Perplexity, at least 1.
    """
    return float(np.exp(-vocabulary.unigram_log_probs()[np.asarray(ids)].mean()))
