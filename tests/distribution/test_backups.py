"""What processes agree to go on from, and the callback of one process."""

import errno
import os
import re

import h5py
import keras
import numpy as np
import pytest

from keras_moe import distribution, writing
from keras_moe.distribution import backups

X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")


def make_model():
    keras.utils.set_random_seed(5)
    layers = [keras.Input((3,)), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    return model


def fit(folder, epochs, *more):
    model = make_model()
    backup = distribution.Backup(folder)
    history = model.fit(
        X, X[:, :2], 4, epochs, verbose=0, shuffle=False, callbacks=[backup, *more]
    )
    return model.get_weights(), history.epoch


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 2 and batch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("size", [None, 0, 96, 5000, -100])
def test_fit_goes_on_exactly_from_the_last_whole_epoch(tmp_path, size, capsys):
    whole, epochs = fit(tmp_path / "whole", 4)
    assert epochs == [0, 1, 2, 3]
    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        fit(folder, 4, Interrupt())
    path = folder / "epoch_2.weights.h5"
    if size is not None:
        path.write_bytes(path.read_bytes()[:size])
    resumed, epochs = fit(folder, 4)
    assert epochs == ([2, 3] if size is None else [1, 2, 3])
    assert ("is damaged" in capsys.readouterr().out) == (size is not None)
    for ours, theirs in zip(resumed, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(backups.files(folder)) == [3, 4]
    assert len(os.listdir(folder)) == 4  # with a digest each


def test_a_file_of_another_model_is_named(tmp_path):
    fit(tmp_path, 1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(7)])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match=r"epoch_1\.weights\.h5 is whole, but not of"):
        model.fit(X, X, verbose=0, callbacks=[distribution.Backup(tmp_path)])


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".partial.epoch_9.weights.h5").write_text("left by a kill")
    fit(tmp_path, 3)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert len(os.listdir(tmp_path)) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Epochs 2 and 3."""
    folder = tmp_path_factory.mktemp("backup")
    fit(folder, 3)
    return folder


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([(2, 3, 0)], 3),
        ([(1, 2, 0)], 2),  # was ended before it wrote
        ([(0, 2, 0), (2, 3, 0)], 2),  # one of three has a damaged file
        ([(0, 0, 0)], "do not belong together. Received: [3, 0] epochs"),
        ([(0, 1, 0)], "do not belong together. Received: [3, 1] epochs"),
        ([(4, 5, 0)], "do not belong together. Received: [3, 5] epochs"),
        ([(2, 3, 0), (0, 0, 1)], "damaged files only (worker 2). Try this."),
    ],
)
def test_processes_agree(folder, monkeypatch, others, expected):
    monkeypatch.setattr(
        backups, "gathered", lambda values, strategy: [tuple(values), *others]
    )
    if isinstance(expected, int):
        assert backups.agreed(folder, None, "Try this.") == expected
        return
    with pytest.raises(ValueError, match=re.escape(expected)):
        backups.agreed(folder, None, "Try this.")


def test_the_first_epoch_of_some_begins_anew(tmp_path, monkeypatch):
    """One worker had written its first file, and the other was ended before."""
    fit(tmp_path, 1)
    monkeypatch.setattr(
        backups, "gathered", lambda values, strategy: [tuple(values), (0, 0, 0)]
    )
    assert backups.agreed(tmp_path, None, "Try this.") == 0


def test_damage_without_a_digest(folder, tmp_path):
    """Of files of earlier versions only what HDF5 sees, and what it cannot read."""
    content = (folder / "epoch_3.weights.h5").read_bytes()
    path = tmp_path / "epoch_3.weights.h5"
    for given, expected in (
        (content, None),
        (content[:-1], "OSError: .*truncated file"),
        (content[:90], "OSError: "),
        (b"", "OSError: "),
        (b"text", "OSError: .*file signature not found"),
    ):
        path.write_bytes(given)
        found = backups.damage(path)
        assert found is expected is None or re.match(expected, found), found
    path.write_bytes(content)
    # What is no digest says nothing.
    (tmp_path / "epoch_3.weights.h5.sha256").write_text("")
    assert backups.damage(path) is None
    (tmp_path / "epoch_3.weights.h5.sha256").write_text("0" * 64 + "  epoch_3\n")
    assert backups.damage(path) == "it is not what was written"


def test_the_room_asked_for_is_enough(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        writing, "verify_room", lambda path, number: asked.append(number)
    )
    model = make_model()
    model.fit(X, X[:, :2], verbose=0)
    backups.write_weights(model, folder / "other.weights.h5")
    size = (folder / "other.weights.h5").stat().st_size
    with h5py.File(folder / "other.weights.h5") as file:
        found = []
        file.visititems(lambda name, item: found.append(isinstance(item, h5py.Dataset)))
    assert sum(found) > 4
    assert size < asked[0] < size + 8192 * sum(found)


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_room_is_asked_for_and_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "big.h5"
    writing.verify_room(path, 1000)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(writing.os, "posix_fallocate", full, raising=False)
    with pytest.raises(writing.NoRoomError) as caught:
        writing.verify_room(tmp_path / ".partial.big.h5", 1000)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value) == (
        f"{path} could not be written (up to 1,000 bytes): No space left on device. "
        "Free some space on its disk. What stood there before is kept."
    )

    def cannot_tell(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(writing.os, "posix_fallocate", cannot_tell, raising=False)
    writing.verify_room(path, 1000)
    monkeypatch.delattr(writing.os, "posix_fallocate")
    writing.verify_room(path, 1000)


@pytest.mark.parametrize(
    ("error", "is_room"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        # As h5py says it, when it closes a file.
        (RuntimeError("Can't decrement id ref count (errno = 28, error = '')"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("something else"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(tmp_path, error, is_room):
    path = tmp_path / "file"
    path.write_text("before")

    def write():
        with writing.written_beside(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(writing.NoRoomError if is_room else type(error)) as caught:
        write()
    if is_room:
        assert f"{path} could not be written: " in str(caught.value)
        assert caught.value.__cause__ is error
    else:
        assert caught.value is error
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]
