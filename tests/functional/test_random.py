"""Rows drawn by position are rows of the whole draw."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional


@pytest.mark.parametrize("width", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_rows_are_those_of_the_whole_draw(width, dtype, kind):
    seed = tf.constant([1701, 3], tf.int64)
    generator = keras.random.SeedGenerator(1701)
    for _ in range(4):  # the generator counts its draws: 0, 1, 2, 3
        whole = getattr(keras.random, kind)((50, width), dtype=dtype, seed=generator)
    whole = whole.numpy()
    for first, count in ((0, 50), (0, 1), (13, 20), (49, 1), (17, 0)):
        rows = getattr(functional, f"{kind}_rows")(seed, first, count, width, dtype)
        assert rows.dtype == dtype
        np.testing.assert_array_equal(rows, whole[first : first + count])
    assert not np.array_equal(whole[:25], whole[25:])


def test_rows_far_into_the_draw_are_normal():
    rows = functional.normal_rows(tf.constant([1, 0]), 2**40, 20_000, 4).numpy()
    # Standard errors: 0.0035 of the mean, 0.005 of the variance.
    assert abs(rows.mean()) < 0.018
    assert abs(rows.var() - 1) < 0.025
