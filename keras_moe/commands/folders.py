"""The folder of a training run: whose it is, what it holds, what is wrong with it."""

import csv
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_moe import writing

SETTINGS, HISTORY, MODEL = "settings.json", "history.csv", "model.keras"
WEIGHTS, BACKUP, FINISHED = "best.weights.h5", "checkpoint", "finished.json"
# The key of the settings by which a folder is known as a run of this package.
_MARK = "run_of"
ANEW = "Start again in another `output_dir`, or with --overwrite."
GOES_ON = "The same command goes on from the last finished epoch."


def check_folder(options: Any, folder: Path) -> None:
    """Raises unless a run of these options may write to a folder; writes nothing.

    Args:
        options: Those of the command.
        folder: Where this process writes.

    Raises:
        ValueError: It cannot be written, holds other files or a run with other
            settings, or its settings are damaged; or it is to be overwritten and is
            not marked as a run.
    """
    verify_writable(folder, "output_dir")
    if not (folder / SETTINGS).exists():
        others = folder.iterdir() if folder.exists() else ()
        if any(not path.name.startswith(writing.PARTIAL) for path in others):
            raise ValueError(
                "`output_dir` must be new, empty, or an earlier run. Received: "
                f"{str(folder)!r}, which holds other files. Choose another folder."
            )
        return
    remedy = "Choose another `output_dir`, or delete the folder if nobody needs it."
    there = read_json(folder / SETTINGS, remedy)
    mark = there.pop(_MARK, None)
    if options.overwrite:
        if mark is None:
            raise ValueError(
                "--overwrite empties only what is marked as a run of this package. "
                f"Received: {str(folder)!r}, whose {SETTINGS} has no {_MARK!r}. "
                f"{remedy} (A run of an older version is marked when it goes on.)"
            )
        return
    _verify_settings(there, options, mark, folder)


def prepare_folder(options: Any, folder: Path) -> None:
    """Makes the folder of a run, empties it, or goes on with what is there.

    Args:
        options: Those of the command.
        folder: Where this process writes.

    Raises:
        ValueError: As `check_folder`.
    """
    check_folder(options, folder)
    make_folder(folder, "output_dir")
    settings = {_MARK: f"keras_moe {options.COMMAND}", **options.settings()}
    path = folder / SETTINGS
    if options.overwrite and path.exists():
        # Whoever is interrupted here leaves a folder that is marked, and not
        # half a run that seems to go on.
        write_json(path, {_MARK: settings[_MARK]})
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != path:
                entry.unlink()
    write_json(path, settings)
    if (folder / BACKUP).exists() and not (folder / FINISHED).exists():
        print(f"Going on with the interrupted run in {folder}.")


def _verify_settings(there, options, mark, folder):
    if mark not in (None, f"keras_moe {options.COMMAND}"):
        raise ValueError(
            "`output_dir` holds the run of another command. Received: "
            f"{str(folder)!r}, a run of {mark}. Choose another folder."
        )
    new = options.settings()
    there = {**{k: v for k, v in options.BEFORE.items() if k in new}, **there}
    differing = {k for k in there.keys() | new.keys() if there.get(k) != new.get(k)}
    if differing:
        listed = ", ".join(
            f"{k}: {there.get(k)!r} there, {new.get(k)!r} now"
            for k in sorted(differing)
        )
        raise ValueError(
            f"`output_dir` holds a run with other settings. Received: {str(folder)!r} "
            f"({listed}). Use the same settings to go on with it, another "
            "`output_dir`, or `overwrite` (--overwrite) to start again."
        )


def verify_writable(folder: Path, name: str) -> None:
    """Raises a `ValueError` unless `folder` is, or can become, one to write to."""
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(
            f"`{name}` must be a folder. Received: {str(folder)!r}, and {existing} is "
            "a file. Choose another folder."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"`{name}` must be a folder that can be written. Received: "
            f"{str(folder)!r}, and {existing} cannot. Choose another folder."
        )


def make_folder(folder: Path, name: str) -> None:
    """Makes a folder, or says that it cannot.

    Raises:
        ValueError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`{name}` must be a folder that can be written. Received: "
            f"{str(folder)!r}: {error.strerror}. Choose another folder."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, as a whole or not at all."""
    writing.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object of a run.

    Args:
        path: Path of the file.
        remedy: What to do if it is damaged.

    Raises:
        ValueError: It is missing, cannot be read, or is no JSON object.
    """
    value = read_whole(
        path, lambda: json.loads(path.read_text(encoding="utf-8")), remedy
    )
    if not isinstance(value, dict):
        raise damaged(path, "it is no JSON object", remedy)
    return value


def read_whole(path: Path, read: Callable[[], Any], remedy: str) -> Any:
    """What `read` reads from a file of a run, or an error that names the file.

    Args:
        path: Path of the file.
        read: Function without arguments.
        remedy: What to do if it is damaged.

    Raises:
        ValueError: The file is missing, or `read` fails.
    """
    if not path.is_file():
        raise damaged(path, "it is missing", remedy)
    try:
        return read()
    # Libraries fail in every way on what they did not write.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
        raise damaged(path, reason[:300], remedy) from error


def damaged(path: Path, reason: str, remedy: str) -> ValueError:
    """The error of a file of a run that cannot be used."""
    return ValueError(f"{path} is damaged or no file of this run: {reason}. {remedy}")


def read_history(folder: Path) -> list[dict[str, float]]:
    """The logs of the epochs so far, one dict for each.

    Raises:
        ValueError: The file is damaged.
    """
    path = folder / HISTORY
    if not path.exists():
        return []

    def read():
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                {k: float(v) for k, v in row.items() if v != ""}
                for row in csv.DictReader(file)
            ]
        if [row["epoch"] for row in rows] != list(range(len(rows))):
            raise ValueError("its epochs are not 0, 1, 2, ...")
        for row in rows:
            row["seconds"], row["val_perplexity"]
        return rows

    return read_whole(path, read, ANEW)


def write_history(folder: Path, rows: list[dict[str, float]]) -> None:
    """Writes the logs of all epochs so far."""
    with (
        writing.written_beside(folder / HISTORY) as partial,
        open(partial, "w", newline="", encoding="utf-8") as file,
    ):
        # A newer version may log other figures than the one that began.
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)


def load_weights(model: keras.Model, path: Path) -> None:
    """Loads weights of a run.

    Raises:
        ValueError: The file is missing or damaged, or of another model.
    """
    read_whole(path, lambda: model.load_weights(path), ANEW)


def save_model(model: keras.Model, folder: Path) -> None:
    """Writes the model of a run, as a whole or not at all."""
    with writing.written_beside(folder / MODEL) as partial:
        model.save(partial)


def load_model(path: Path) -> Any:
    """Loads the model of a run.

    Raises:
        ValueError: The file is missing or damaged.
    """
    if path.is_file() and not zipfile.is_zipfile(path):
        raise damaged(path, "it is no .keras file", _WRITTEN_AGAIN)
    return read_whole(path, lambda: keras.saving.load_model(path), _WRITTEN_AGAIN)


_WRITTEN_AGAIN = "The command that trained the model writes the file again."


def finished_seconds(folder: Path) -> float | None:
    """Seconds of the training of a finished run; None if it is not finished.

    Raises:
        ValueError: The file that says so is damaged.
    """
    path = folder / FINISHED
    if not path.exists():
        return None
    remedy = "Delete it, and the same command finishes the run again."
    seconds = read_json(path, remedy).get("training_seconds")
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        raise damaged(path, "it does not say the `training_seconds`", remedy)
    return float(seconds)
