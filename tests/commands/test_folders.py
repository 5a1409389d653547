"""What a run finds in its folder: nothing deleted, nothing left half written."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from keras_moe import writing
from keras_moe.__main__ import main
from keras_moe.commands import folders
from keras_moe.commands.options import TrainLMOptions, TrainMTOptions


def options_of(folder, kind=TrainLMOptions, **changes):
    return kind(output_dir=str(folder), **changes)


def finished_run(folder, kind=TrainLMOptions, **changes):
    options = options_of(folder, kind, **changes)
    folders.prepare_folder(options, folder)
    (folder / "model.keras").write_text("model")
    (folder / "saved_model" / "1").mkdir(parents=True)
    return options


@pytest.mark.parametrize(
    "settings",
    ['{"editor.fontSize": 12}', "{}", "[]", "", '{"units": 1', "\xff", "older"],
)
def test_overwrite_leaves_alone_what_is_not_marked_as_a_run(tmp_path, settings):
    options = options_of(tmp_path, overwrite=True)
    if settings == "older":  # version 0.1.0 wrote the settings alone
        settings = json.dumps(options.settings())
    (tmp_path / "settings.json").write_bytes(settings.encode("latin-1"))
    (tmp_path / "mine.txt").write_text("mine")
    for function in (folders.check_folder, folders.prepare_folder):
        with pytest.raises(ValueError, match="overwrite|settings.json is damaged"):
            function(options, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "settings.json").read_bytes() == settings.encode("latin-1")


def test_overwrite_empties_a_run_and_follows_no_link(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    finished_run(folder)
    (folder / "link").symlink_to(other)
    again = options_of(folder, overwrite=True, units=16)
    folders.check_folder(again, folder)
    assert (folder / "model.keras").exists()  # looking deletes nothing
    folders.prepare_folder(again, folder)
    assert [path.name for path in folder.iterdir()] == ["settings.json"]
    assert (other / "mine.txt").read_text() == "mine"
    folders.check_folder(options_of(folder, units=16), folder)


def test_an_interruption_while_emptying_leaves_no_run_to_go_on_with(
    tmp_path, monkeypatch
):
    options = finished_run(tmp_path)
    (tmp_path / "checkpoint").mkdir()

    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            folders.prepare_folder(options_of(tmp_path, overwrite=True), tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        folders.check_folder(options, tmp_path)
    folders.prepare_folder(options_of(tmp_path, overwrite=True), tmp_path)
    assert os.listdir(tmp_path) == ["settings.json"]


def test_a_run_of_an_older_version_goes_on_and_is_marked(tmp_path, capsys):
    options = options_of(tmp_path, activation="sigmoid", noise="learned")  # as it was
    # Not the options that there were not.
    known = {k: v for k, v in options.settings().items() if k not in options.BEFORE}
    assert len(known) < len(options.settings())
    (tmp_path / "settings.json").write_text(json.dumps(known))
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match="activation: 'sigmoid' there, 'relu' now"):
        folders.check_folder(options_of(tmp_path, activation="relu"), tmp_path)
    # Where not all rows of words are read they stayed, which is another training.
    assert "num_sampled" in known
    for num_sampled, before in ((None, None), (50, "keep")):
        known["num_sampled"] = num_sampled
        (tmp_path / "settings.json").write_text(json.dumps(known))
        again = dataclasses.replace(options, num_sampled=num_sampled)
        if before is not None:
            with pytest.raises(ValueError, match="untouched_rows: 'keep' there"):
                folders.check_folder(again, tmp_path)
            again = dataclasses.replace(again, untouched_rows=before)
        folders.check_folder(again, tmp_path)
    known["num_sampled"] = None
    (tmp_path / "settings.json").write_text(json.dumps(known))
    folders.prepare_folder(options, tmp_path)
    assert "Going on with the interrupted run" in capsys.readouterr().out
    folders.check_folder(options_of(tmp_path, overwrite=True), tmp_path)


def test_the_run_of_another_command_is_refused(tmp_path):
    finished_run(tmp_path, TrainMTOptions)
    with pytest.raises(ValueError, match="a run of keras_moe train-mt"):
        folders.check_folder(options_of(tmp_path), tmp_path)


@pytest.mark.parametrize("command", ["train-lm", "train-mt", "plan"])
def test_a_folder_that_cannot_be_is_an_error_at_once(
    tmp_path, monkeypatch, capsys, command
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/run", "link"):
        assert main([command, "--output-dir", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert "`output_dir` must be a folder" in captured.err
        assert "Reading" not in captured.out
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert main([command, "--output-dir", str(tmp_path / "new")]) == 2
    assert "that can be written" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="`output_dir`.*Permission denied"):
        folders.make_folder(tmp_path / "new", "output_dir")


def test_what_is_interrupted_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "settings.json"
    writing.write_text(path, "old")

    def write_half():
        with writing.written_beside(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["settings.json"]


def test_what_a_kill_leaves_refuses_no_folder(tmp_path):
    (tmp_path / ".partial.settings.json").write_text("{")
    folders.prepare_folder(options_of(tmp_path), tmp_path)
    assert os.listdir(tmp_path) == ["settings.json"]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"a": 1', b"\xff\xfe", b"[" * 100_000, None]
)
def test_damaged_json_names_the_file_and_the_remedy(tmp_path, content):
    path = tmp_path / "report.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"report\.json is damaged.*Make it again\."):
        folders.read_json(path, "Make it again.")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"epoch,seconds,val_perplexity\n0,1.0\n",
        b"epoch,seconds,val_perplexity\n0,1.0,x\n",
        b"epoch,seconds,val_perplexity\n1,1.0,2.0\n",
        b"epoch,val_perplexity\n0,2.0\n",
        b"\xff\x00",
        b"epoch,seconds,val_perplexity\n0,1.0,2.0,3.0\n",
    ],
)
def test_a_damaged_history_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "history.csv").write_bytes(content)
    if not content:
        assert folders.read_history(tmp_path) == []
        return
    with pytest.raises(ValueError, match=r"history\.csv is damaged"):
        folders.read_history(tmp_path)


def test_a_history_may_get_further_columns(tmp_path):
    rows = [
        {"epoch": 0, "seconds": 1.0, "val_perplexity": 3.0},
        {"epoch": 1, "seconds": 1.0, "val_perplexity": 2.0, "load": 0.5},
    ]
    folders.write_history(tmp_path, rows)
    assert folders.read_history(tmp_path) == rows
