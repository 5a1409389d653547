import pytest

from keras_moe import telemetry


def test_scores_carry_their_signatures():
    texts = ["the cat sat on the mat", "a dog ran away quickly"]
    scores = telemetry.translation_scores(texts, texts, "fr")
    assert scores["bleu"] == pytest.approx(100.0)
    assert scores["chrf"] == pytest.approx(100.0)
    assert "tok:13a" in scores["bleu_signature"]
    assert "nc:6" in scores["chrf_signature"]
    worse = telemetry.translation_scores(["the cat sat here", "a dog"], texts, "fr")
    assert worse["bleu"] < scores["bleu"]


def test_japanese_is_scored_by_characters():
    hypothesis, reference = ["彼女は外出しました。"], ["彼女は外出した。"]
    scores = telemetry.translation_scores(hypothesis, reference, "jpn")
    assert "tok:char" in scores["bleu_signature"]
    # As words the sentences have nothing in common.
    assert scores["bleu"] > 40
    assert telemetry.translation_scores(hypothesis, reference, "fr")["bleu"] < 40


def test_errors():
    with pytest.raises(ValueError, match="1 hypotheses, 2 references"):
        telemetry.translation_scores(["a"], ["a", "b"], "fr")
