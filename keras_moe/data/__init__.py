"""Text for language models: vocabularies, streams, an embedded corpus."""

from keras_moe.data.text import TextCorpus, load_text_corpus
from keras_moe.data.vocabulary import (
    BLANK_PATTERN,
    DETOKENIZATION_RULES,
    EOS,
    PAD,
    TOKENIZERS,
    UNK,
    WORD_PATTERN,
    Vocabulary,
    tokenize,
    unigram_perplexity,
)

__all__ = [
    "BLANK_PATTERN",
    "DETOKENIZATION_RULES",
    "EOS",
    "PAD",
    "TOKENIZERS",
    "UNK",
    "WORD_PATTERN",
    "TextCorpus",
    "Vocabulary",
    "load_text_corpus",
    "tokenize",
    "unigram_perplexity",
]
