import numpy as np
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


def test_mutual_information_by_hand():
    # Independent, fully dependent, and in between: I = sum p log(p / (p_e p_l)).
    assert telemetry.mutual_information(np.ones((4, 3))) == pytest.approx(
        0.0, abs=1e-12
    )
    full = telemetry.mutual_information(np.diag([2.0, 2.0, 2.0]))
    assert full == pytest.approx(np.log(3))
    between = 2 * (
        3 / 8 * np.log((3 / 8) / (1 / 4)) + 1 / 8 * np.log((1 / 8) / (1 / 4))
    )
    counts = np.array([[3.0, 1.0], [1.0, 3.0], [0.0, 0.0]])
    assert telemetry.mutual_information(counts) == pytest.approx(between)


def test_errors():
    with pytest.raises(ValueError, match="1 hypotheses, 2 references"):
        telemetry.translation_scores(["a"], ["a", "b"], "fr")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        telemetry.mutual_information(np.ones(3))
    with pytest.raises(ValueError, match="sum 0"):
        telemetry.mutual_information(np.zeros((2, 2)))
