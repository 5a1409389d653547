import numpy as np
import pytest

from keras_moe import models

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], "float32"))


def frequencies(samples=4000, **options):
    logits = np.repeat(LOGITS[None], samples, axis=0)
    uniform = np.random.default_rng(0).uniform(size=samples)
    drawn = models.sample_tokens(logits, uniform, **options).numpy()
    return np.bincount(drawn, minlength=4) / samples


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        # Temperature 1/2 squares: 0.25, 0.09, 0.0225, 0.0025 of 0.365.
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"top_k": 2}, [0.625, 0.375, 0.0, 0.0]),
        ({"forbidden_tokens": [0]}, [0.0, 0.6, 0.3, 0.1]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_frequencies(options, expected):
    # Standard error below sqrt(0.25 / 4000) = 0.008.
    np.testing.assert_allclose(frequencies(**options), expected, atol=4 * 0.008)


def test_excluded_tokens_never_appear():
    assert frequencies(top_k=2)[2:].sum() == 0
    assert frequencies(forbidden_tokens=[0, 3])[[0, 3]].sum() == 0


def test_bad_arguments_are_refused():
    seed = [0.5]
    with pytest.raises(ValueError, match="temperature=-1"):
        models.sample_tokens(LOGITS[None], seed, temperature=-1)
    with pytest.raises(ValueError, match="top_k=5, vocabulary size=4"):
        models.sample_tokens(LOGITS[None], seed, top_k=5)
    with pytest.raises(ValueError, match="top_k=0"):
        models.sample_tokens(LOGITS[None], seed, top_k=0)
