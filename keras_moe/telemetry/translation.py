"""Scores of translations."""

from collections.abc import Sequence

from keras_moe import checks

# Written without blanks: words cannot be told apart, so BLEU counts characters.
_WITHOUT_BLANKS = ("ja", "jpn", "zh", "zho", "cmn", "th", "tha")


def translation_scores(
    hypotheses: Sequence[str], references: Sequence[str], language: str
) -> dict[str, float | str]:
    """BLEU and chrF of a corpus, by sacrebleu, with the signatures to quote.

    Args:
        hypotheses: Translations, one str each, as readers would see them.
        references: One for each hypothesis.
        language: Target language: Japanese, Chinese and Thai are split into
            characters, others as WMT does (13a).

    Returns:
        Dict of `bleu`, `bleu_signature`, `chrf`, `chrf_signature`; the scores go
        from 0 to 100.

    Raises:
        ImportError: sacrebleu is not installed.
        ValueError: There are no hypotheses, or not as many as references.

    Example:

    >>> scores = keras_moe.telemetry.translation_scores(
    ...     ["the cat sat down"], ["the cat sat down"], "en"
    ... )
    >>> round(scores["bleu"], 1)
    100.0

    Reference:
        Post 2018, "A call for clarity in reporting BLEU scores".
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError(
            "Scoring translations needs sacrebleu. Install keras-moe[translation]."
        ) from error
    hypotheses = checks.verify_texts(hypotheses, "hypotheses")
    references = checks.verify_texts(references, "references")
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            "`hypotheses` must be as many as `references`, at least one. Received: "
            f"{len(hypotheses)} hypotheses, {len(references)} references. Translate "
            "every source."
        )
    found: dict[str, float | str] = {}
    split = "char" if language in _WITHOUT_BLANKS else "13a"
    for name, metric in (("bleu", BLEU(tokenize=split)), ("chrf", CHRF())):
        found[name] = metric.corpus_score(hypotheses, [references]).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found
