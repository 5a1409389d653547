"""Text for language models and translation: vocabularies, corpora, batches."""

from keras_moe.data.subwords import SubwordVocabulary
from keras_moe.data.text import TextCorpus, default_tokenizer, load_text_corpus
from keras_moe.data.tfds_text import StreamedCorpus, load_tfds_text, prepare_lm1b
from keras_moe.data.tfds_translation import load_tfds_translation
from keras_moe.data.translation import TranslationCorpus, load_translation_corpus
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
    "StreamedCorpus",
    "SubwordVocabulary",
    "TextCorpus",
    "TranslationCorpus",
    "Vocabulary",
    "default_tokenizer",
    "load_text_corpus",
    "load_tfds_text",
    "load_tfds_translation",
    "load_translation_corpus",
    "prepare_lm1b",
    "tokenize",
    "unigram_perplexity",
]
