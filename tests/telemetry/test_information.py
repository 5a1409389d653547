import numpy as np
import pytest

from keras_moe import telemetry
from tests.oracles import telemetry as oracle


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


def test_label_information_equals_the_oracle(rng):
    units = rng.integers(0, 5, size=(30, 6))
    labels = np.arange(30) % 3
    found = telemetry.label_information(units, labels, 3)
    counts, information = oracle.label_information(units, labels, 3)
    np.testing.assert_allclose(found.counts, counts)
    assert found.information == pytest.approx(information)


def test_labels_of_unequal_size_count_the_same():
    # Label 0 has 9 times the tokens; experts and labels still tell each other.
    units = np.array([[90, 0], [0, 10]])
    found = telemetry.label_information(units, np.array([0, 1]), 2)
    assert found.information == pytest.approx(np.log(2))


def test_the_null_shuffles_whole_units():
    # Two units that share expert 0: a shuffle keeps or swaps both labels, and either
    # way half of the tokens tell theirs. Were single assignments shuffled, both of
    # expert 0 would at times have one label, and all tokens tell theirs.
    units = np.array([[250, 250, 0], [250, 0, 250]])
    found = telemetry.label_information(units, np.array([0, 1]), 2)
    assert found.information == pytest.approx(0.5 * np.log(2))
    np.testing.assert_allclose(found.shuffled, 0.5 * np.log(2))


def test_units_that_know_their_label_stand_above_the_null(rng):
    labels = rng.integers(0, 4, size=200)
    known = 3 * np.eye(8)[labels]
    found = telemetry.label_information(known, labels, 4)
    assert found.information == pytest.approx(np.log(4))
    assert max(found.shuffled) < 0.2
    drawn = np.eye(8)[rng.integers(0, 8, size=200)]
    chance = telemetry.label_information(drawn, labels, 4, shuffles=40)
    assert chance.information < 1.5 * max(chance.shuffled)


def test_errors():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        telemetry.mutual_information(np.ones(3))
    with pytest.raises(ValueError, match="sum 0"):
        telemetry.mutual_information(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2,\)"):
        telemetry.label_information(np.ones((3, 2)), np.array([0, 1]), 2)
    with pytest.raises(ValueError, match="0 to 2, num_labels=2"):
        telemetry.label_information(np.ones((3, 2)), np.array([0, 1, 2]), 2)
