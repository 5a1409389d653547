"""A training that is interrupted, diverges, or finds damaged files."""

import errno
import json
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import writing
from keras_moe.commands import compiling, folders, runs

TOKENS = np.arange(48).reshape(12, 4) % 7


class Model(keras.Sequential):
    moe_layers = ()


class Poison(keras.callbacks.Callback):
    """Puts a NaN into the weights after so many steps."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, batch, logs=None):
        self.steps -= 1
        if self.steps == 0:
            weight = self.model.trainable_variables[0]
            weight.assign(tf.fill(weight.shape, np.nan))


def options_of(**changes):
    given = {"epochs": 3, "patience": 2, "verbose": 0, "learning_rate": 0.1}
    return SimpleNamespace(**{**given, "warmup_steps": 1, **changes})


def train(folder, *more, options=None, epochs_run=None):
    """A run of three epochs of three steps; the weights it ends with."""
    keras.utils.set_random_seed(3)
    layers = [
        keras.layers.Embedding(7, 4),
        keras.layers.Dropout(0.3, seed=1),
        keras.layers.Dense(7),
    ]
    model = Model(layers)
    model.build((None, 4))
    compiling.compile_model(model, keras.optimizers.Adam(0.1))
    folder.mkdir(exist_ok=True)

    def fit(announce, callbacks, **arguments):
        if epochs_run is not None:
            epochs_run.append(arguments["initial_epoch"])
        model.fit(
            TOKENS,
            (TOKENS + 1) % 7,
            batch_size=4,
            validation_data=(TOKENS, (TOKENS + 1) % 7),
            callbacks=[*more, *callbacks],
            **arguments,
        )

    runs.train(model, folder, options or options_of(), fit)
    return model.get_weights()


@pytest.mark.slow
def test_a_run_cut_at_any_of_its_writes_goes_on_exactly(tmp_path, monkeypatch):
    replace = writing.os.replace
    options = options_of(epochs=2)
    whole = train(tmp_path / "whole", options=options)
    count = 0
    while True:
        folder, writes = tmp_path / f"cut{count}", [0]

        def cut(source, target, at=count, writes=writes):
            if writes[0] == at:
                raise KeyboardInterrupt
            writes[0] += 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(writing.os, "replace", cut)
            try:
                train(folder, options=options)
                break
            except KeyboardInterrupt:
                pass
        for ours, theirs in zip(train(folder, options=options), whole, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        history = folders.read_history(folder)
        assert [row["epoch"] for row in history] == [0, 1]
        assert not (folder / "checkpoint").exists()
        count += 1
    # Two epochs of best weights, history, digest, checkpoint; then that it is finished.
    assert count == 9


def test_a_training_that_diverges_is_an_error_and_not_finished(tmp_path):
    with pytest.raises(ValueError, match=r"diverged: `loss` was nan after epoch 2\. "):
        train(tmp_path, Poison(5))
    assert not (tmp_path / "finished.json").exists()
    assert [row["epoch"] for row in folders.read_history(tmp_path)] == [0]
    assert list(runs.checkpoints(tmp_path / "checkpoint")) == [1]
    began = []
    train(tmp_path, epochs_run=began)  # what is kept is good
    assert began == [1]


def test_a_divergence_is_seen_within_an_epoch(tmp_path, monkeypatch):
    stop = runs.StopDiverged
    monkeypatch.setattr(runs, "StopDiverged", lambda options: stop(options, interval=2))
    with pytest.raises(ValueError, match=r"nan after 2 steps of epoch 1.*rate=0.1"):
        train(tmp_path, Poison(1))
    assert not list(tmp_path.iterdir())


def test_patience_counts_the_epochs_before_an_interruption():
    rows = [{"val_perplexity": value} for value in (3.0, 2.0, 2.5, 2.0)]
    keeper = runs.KeepBest("path", rows, patience=3)
    assert (keeper.best, keeper.waited, keeper.is_over) == (2.0, 2, False)
    assert runs.KeepBest("path", rows, patience=2).is_over


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(ValueError, match="diverged"):
        train(folder, Poison(8))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("history.csv", b"epoch,seconds,val_perplexity\n0,1.0", r"history\.csv is dam"),
        ("history.csv", None, r"history\.csv is damaged.*0 epochs, where 2"),
        ("finished.json", b"", r"finished\.json is damaged"),
        ("finished.json", b'{"training_seconds": "x"}', r"finished\.json is damaged"),
        ("finished.json", b"{}", r"finished\.json is damaged.*Delete it"),
    ],
)
def test_a_damaged_file_is_named_before_the_training(
    interrupted, tmp_path, name, content, message
):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    path = folder / name
    if content is None:
        path.unlink()
    else:
        cut = path.read_bytes()[:content] if isinstance(content, int) else content
        path.write_bytes(cut)
    with pytest.raises(ValueError, match=message):
        train(folder, epochs_run=(began := []))
    assert not began


def cut_to(number):
    return lambda content: content[:number]


def changed(content):
    """One bit, in the middle of the numbers."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "damage",
    [cut_to(0), cut_to(96), cut_to(9000), cut_to(-100), changed],
    ids=["nothing left", "header", "half", "without its end", "one bit"],
)
def test_a_damaged_checkpoint_is_passed_over(
    interrupted, whole, tmp_path, damage, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    path = folder / "checkpoint" / "epoch_2.weights.h5"
    assert path.stat().st_size > 2 * 9000
    path.write_bytes(damage(path.read_bytes()))
    found = train(folder, epochs_run=(began := []))
    assert began == [1]
    printed = capsys.readouterr().out
    assert (
        f"{path} is damaged (it is not what was written): going on after 1" in printed
    )
    for ours, theirs in zip(found, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [row["epoch"] for row in folders.read_history(folder)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["best.weights.h5", "checkpoint/epoch_2.weights.h5"])
def test_best_weights_are_read_from_the_checkpoint(interrupted, whole, tmp_path, name):
    """Or the checkpoint is passed over that has them."""
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    (folder / name).unlink()
    for ours, theirs in zip(train(folder), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (("epoch_1", "epoch_2"), r"damaged files only \(none.*epoch_1.*--overwrite"),
        (("best", "epoch_1"), r"best\.weights\.h5 is damaged.*--overwrite"),
    ],
)
def test_what_is_not_whole_twice_is_an_error(interrupted, tmp_path, cut, message):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    for path in folder.rglob("*.h5"):
        if path.name.startswith(cut):
            path.write_bytes(path.read_bytes()[:5000])
    rows = folders.read_history(folder)
    rows[0]["val_perplexity"] = 0.5  # the best, which one checkpoint has
    folders.write_history(folder, rows)
    with pytest.raises(ValueError, match=message):
        train(folder, epochs_run=(began := []))
    assert not began


def test_a_full_disk_names_the_file_and_loses_nothing(
    interrupted, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "posix_fallocate", full, raising=False)
        with pytest.raises(writing.NoRoomError, match=r"h5 could not .* No space left"):
            train(folder)
    changed = {p.name for p, content in before.items() if p.read_bytes() != content}
    assert changed <= {"history.csv"}  # where the third epoch is not the best
    for ours, theirs in zip(train(folder), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_checkpoint_of_version_0_1_0_goes_on(interrupted, tmp_path, is_cut):
    """Keras' `BackupAndRestore` with `double_checkpoint`, perhaps cut in a write."""
    folder = tmp_path / "run"
    shutil.copytree(interrupted, folder)
    backup = folder / "checkpoint"
    for number, end in ((2, ""), (1, ".bkp")):
        path = backup / f"epoch_{number}.weights.h5"
        path.rename(backup / f"latest.weights.h5{end}")
        metadata = backup / f"training_metadata.json{end}"
        metadata.write_text(json.dumps({"epoch": number, "batch": 0}))
    if is_cut:
        path = backup / "latest.weights.h5"
        path.write_bytes(path.read_bytes()[:900])
    began = []
    train(folder, epochs_run=began)
    assert began == [1 if is_cut else 2]
    assert [row["epoch"] for row in folders.read_history(folder)] == [0, 1, 2]
