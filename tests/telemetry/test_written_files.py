"""What can't be written is said before the training, not after it."""

import keras
import numpy as np
import pytest

from keras_moe import layers, telemetry

WORDS = np.array([str(i) for i in range(10)])


@pytest.fixture
def model():
    model = keras.Sequential(
        [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(10, 4),
            layers.MoE(layers.FeedForwardExperts(4, 5), layers.TopKGating(k=2)),
        ]
    )
    model.compile("sgd", "mse", run_eagerly=True)
    return model


class Epochs(keras.callbacks.Callback):
    """Counts the epochs that began."""

    number = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.number += 1


def fails_before_the_training(model, callback, message):
    x, y = np.zeros((2, 3), "int32"), np.zeros((2, 3, 4), "float32")
    epochs = Epochs()
    with pytest.raises(ValueError, match=message):
        model.fit(x, y, verbose=0, callbacks=[callback, epochs])
    assert epochs.number == 0


def shown(folder, batches=None, words=WORDS.__getitem__, **options):
    batches = [np.array([[1, 2, 3]])] if batches is None else batches
    return telemetry.ExpertSpecialization(batches, words, folder=folder, **options)


def test_usage_that_cannot_be_written(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for picture, message in (
        (file / "x.png", r"`picture`.*file.*Choose another"),
        (tmp_path / "x.doc", r"`picture`.*png.*x\.doc"),
        (tmp_path, r"`picture` must be a file"),
        ("/proc/none/x.png", r"`picture`.*/proc/none"),
    ):
        usage = telemetry.ExpertUsage(picture=picture)
        fails_before_the_training(model, usage, message)
    usage = telemetry.ExpertUsage(log_dir=file / "logs")
    fails_before_the_training(model, usage, r"`log_dir` must be a folder.*logs")


def test_a_folder_that_is_missing_is_made(model, tmp_path):
    picture = tmp_path / "no" / "such" / "usage.svg"
    x, y = np.zeros((2, 3), "int32"), np.zeros((2, 3, 4), "float32")
    callbacks = [telemetry.ExpertUsage(picture=picture), shown(tmp_path / "experts")]
    history = model.fit(x, y, verbose=0, callbacks=callbacks).history
    assert "loss" in history
    assert picture.read_text().lstrip().startswith("<?xml")
    assert len(list((tmp_path / "experts").iterdir())) == 2


def test_specialisation_that_cannot_be_written(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    fails_before_the_training(model, shown(file), r"`folder` must be a folder.*file")
    with pytest.raises(ValueError, match=r"`folder` must be a folder"):
        shown(None).write({}, file)


def test_specialisation_of_wrong_batches(model, tmp_path):
    for callback, message in (
        (shown(tmp_path, []), "0 batches"),
        (shown(tmp_path, (b for b in [np.array([[1, 2, 3]])])), "again"),
        (shown(tmp_path, words=lambda batch: ["one"]), r"`words` must return one"),
        (shown(tmp_path, labels=lambda batch: [[1]]), r"`labels` must return one"),
    ):
        fails_before_the_training(model, callback, message)


def test_a_picture_drawn_by_hand_is_checked_too(tmp_path):
    with pytest.raises(ValueError, match=r"`path`.*\.doc"):
        telemetry.ExpertUsage().draw(tmp_path / "x.doc")
