"""What `examples/gate_noise.py` measures, against NumPy."""

import importlib
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_moe.layers import NoisyTopKGating

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("gate_noise")


@pytest.fixture
def gating():
    """Of 8 experts, whose logits are the inputs."""
    keras.utils.set_random_seed(0)
    gating = NoisyTopKGating(k=2, num_experts=8)
    gating.build((None, 9))
    gating.gate_kernel.assign(np.eye(9, 8))
    return gating


def inputs_of(rows):
    logits = np.random.default_rng(0).normal(size=(rows, 8))
    return np.hstack([logits, np.ones((rows, 1))]).astype("float32")


@pytest.mark.parametrize("level", [-50.0, 1.0, 50.0])
def test_noise_spread_and_choices_kept(script, gating, level):
    gating.noise_kernel.assign(np.full((9, 8), level) * (np.arange(9) == 8)[:, None])
    x = inputs_of(4000)
    observed = script.Observed(gating)
    result = gating(x, training=True)
    (rows,) = observed.rows
    logits = x[:, :8].astype("float64")
    stddev = np.logaddexp(0, level) + 1e-2
    np.testing.assert_allclose(rows[:, 0], stddev, rtol=1e-5)
    np.testing.assert_allclose(rows[:, 1], logits.std(axis=1), rtol=1e-4)
    noisy = logits + stddev * np.random.default_rng(1).normal(size=logits.shape)
    wanted = np.mean(
        [
            len(set(a) & set(b)) / 2
            for a, b in zip(
                np.argsort(logits)[:, -2:], np.argsort(noisy)[:, -2:], strict=True
            )
        ]
    )
    kept, tokens = observed.kept
    assert (tokens, 2 * kept % 1) == (4000, 0.0)  # halves are what k = 2 can keep
    np.testing.assert_allclose(kept / tokens, wanted, atol=0.03)
    # As at inference, whatever it was called with.
    best = np.sort(np.argsort(logits)[:, -2:])
    np.testing.assert_array_equal(np.sort(result.expert_indices), best)


def test_noise_can_be_turned_on(script, gating):
    gating.noise_kernel.assign(np.full((9, 8), 5.0) * (np.arange(9) == 8)[:, None])
    x = inputs_of(500)
    observed = script.Observed(gating)
    clean = gating(x).expert_indices.numpy()
    observed.noisy = True
    noisy = gating(x).expert_indices.numpy()
    assert np.mean(np.sort(clean) != np.sort(noisy)) > 0.3
    assert len(observed.rows) == 1  # of the call without noise
