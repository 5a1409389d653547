import keras
import numpy as np
import pytest

from keras_moe import optimizers


@pytest.mark.parametrize("constant", [0, 3])
def test_rises_linearly_stays_and_falls_with_the_root(constant):
    schedule = optimizers.WarmupInverseSquareRoot(0.5, 4, constant)
    for step in range(40):
        t, plateau_end = step + 1, 4 + constant
        if t <= 4:
            expected = 0.5 * t / 4
        elif t <= plateau_end:
            expected = 0.5
        else:
            expected = 0.5 * np.sqrt(plateau_end / t)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6)


def test_config_round_trip_within_an_optimizer():
    optimizer = keras.optimizers.Adam(optimizers.WarmupInverseSquareRoot(0.5, 4, 2))
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert float(copy.learning_rate) == float(optimizer.learning_rate) == 0.125


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="warmup_steps=0"):
        optimizers.WarmupInverseSquareRoot(0.1, 0)
    with pytest.raises(ValueError, match="peak_learning_rate=-1"):
        optimizers.WarmupInverseSquareRoot(-1, 1)
