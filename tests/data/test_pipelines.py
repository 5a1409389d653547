"""Batches that are made ahead, by pipelines that nothing tunes."""

import pytest
import tensorflow as tf

from keras_moe.data import pipelines
from tests.distribution import child


def batches():
    return tf.data.Dataset.range(6).batch(2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pipelines.prefetched(batches()),
        lambda: child.dataset(child.Case()).repeat(),
    ],
    ids=["prefetched", "of the tests on several devices"],
)
def test_no_thread_tunes_a_pipeline(make):
    """One that does may sleep a minute on, and who drops the iterator waits for it."""
    assert batches().options().autotune.enabled is None
    assert make().options().autotune.enabled is False


def test_batches_stay_as_they_were():
    found = [
        batch.tolist() for batch in pipelines.prefetched(batches()).as_numpy_iterator()
    ]
    assert found == [[0, 1], [2, 3], [4, 5]]
