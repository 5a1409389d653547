import keras
import numpy as np
import pytest

from keras_moe import telemetry


def test_perplexity_is_the_exponential_of_the_weighted_mean_over_batches(rng):
    metric = telemetry.Perplexity()
    total = weight = 0.0
    for _ in range(3):
        logits = rng.normal(size=(2, 4, 5))
        targets = rng.integers(0, 5, size=(2, 4))
        w = rng.uniform(size=(2, 4))
        metric.update_state(targets, logits, sample_weight=w)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= (
            w * np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        ).sum()
        weight += w.sum()
    assert float(metric.result()) == pytest.approx(np.exp(total / weight), rel=1e-5)


def test_tokens_of_weight_zero_do_not_count():
    metric = telemetry.Perplexity()
    logits = np.array([[[5.0, 0.0], [0.0, 5.0]]])
    metric.update_state(
        np.array([[0, 0]]), logits, sample_weight=np.array([[1.0, 0.0]])
    )
    # Only the first token: -log sigmoid(5).
    assert float(metric.result()) == pytest.approx(1 + np.exp(-5.0), rel=1e-5)


def test_perplexity_from_probabilities_and_after_a_config_round_trip():
    metric = telemetry.Perplexity(from_logits=False, name="ppl")
    copy = keras.metrics.deserialize(keras.metrics.serialize(metric))
    assert copy.name == "ppl"
    copy.update_state(np.array([[1]]), np.array([[[0.75, 0.25]]]))
    assert float(copy.result()) == pytest.approx(4.0, rel=1e-5)
