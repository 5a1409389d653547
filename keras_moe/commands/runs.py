"""The folder of a training run: its settings, its history, its checkpoints."""

import contextlib
import csv
import importlib.util
import json
import math
import shutil
import time
from pathlib import Path

import keras

from keras_moe import telemetry
from keras_moe.commands.options import DTYPES

SETTINGS, HISTORY, MODEL = "settings.json", "history.csv", "model.keras"
TENSORBOARD, USAGE_PICTURE = "tensorboard", "expert_usage.png"
WEIGHTS, BACKUP, FINISHED = "best.weights.h5", "checkpoint", "finished.json"


def prepare_folder(options, folder: Path | None = None) -> Path:
    """Makes the output folder, or finds an earlier run of the same settings.

    Args:
        options: Those of the command.
        folder: Where this process writes; None means `options.output_dir`.
    """
    folder = Path(options.output_dir) if folder is None else folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"`output_dir` must be a folder. Received: {str(folder)!r}, a file."
        )
    path = folder / SETTINGS
    if options.overwrite and path.exists():
        shutil.rmtree(folder)
    if path.exists():
        _verify_settings(json.loads(path.read_text()), options.settings(), folder)
        if (folder / BACKUP).exists():
            print(f"Going on with the interrupted run in {folder}.")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            "`output_dir` must be new, empty, or an earlier run. Received: "
            f"{str(folder)!r}, which holds other files. Choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options.settings(), indent=2) + "\n")
    return folder


def _verify_settings(old, new, folder):
    differing = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    if differing:
        listed = ", ".join(
            f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in sorted(differing)
        )
        raise ValueError(
            f"`output_dir` holds a run with other settings. Received: {str(folder)!r} "
            f"({listed}). Use the same settings to go on with it, another "
            "`output_dir`, or `overwrite` (--overwrite) to start again."
        )


def verify_numbers(options, names):
    """Raises unless the options named are at least 1 and the rate is positive."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(
                f"`{name}` must be at least 1. Received: {name}="
                f"{getattr(options, name)}."
            )
    if not options.learning_rate > 0:
        raise ValueError(
            "`learning_rate` must be greater than 0. "
            f"Received: learning_rate={options.learning_rate}."
        )


@contextlib.contextmanager
def numbers_of(dtype: str):
    """Inside, models are made of numbers of this type, losses and metrics too.

    Raises:
        ValueError: It is none of `options.DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"`dtype` must be one of {', '.join(DTYPES)}. Received: dtype={dtype!r}"
        )
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy(dtype)
    keras.config.set_floatx("float64" if dtype == "float64" else "float32")
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


class NoiseOfEpoch(keras.callbacks.Callback):
    """Sets the random generators of the layers to what belongs to an epoch.

    Keras does not save their states. With the epoch in their counters a run that
    goes on after an interruption draws the noise it would have drawn without.
    """

    def on_epoch_begin(self, epoch, logs=None):
        for variable in self.model.variables:
            if variable.path.endswith("seed_generator_state"):
                seed = keras.ops.convert_to_numpy(variable)[0]
                variable.assign([seed, epoch << 20])


class History(keras.callbacks.Callback):
    """Appends the logs of every epoch to a CSV file, with its time."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch, "seconds": time.perf_counter() - self._start, **logs}
        # An epoch whose checkpoint was not written before an interruption runs
        # again: its row is replaced.
        rows = [r for r in read_history(self.path.parent) if r["epoch"] < epoch]
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows([*rows, row])


def read_history(folder):
    """The logs of the epochs so far, one dict for each."""
    path = folder / HISTORY
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def compile_model(model, optimizer):
    """Compiles a model of token logits, ready for checkpoints."""
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[telemetry.Perplexity()],
    )
    # Now and not in the first step, so that a file saved before it is complete.
    model.optimizer.build(model.trainable_variables)


def train(model, folder, options, fit) -> float:
    """Trains, or loads what an earlier run has trained to the end.

    Args:
        model: A compiled model.
        folder: Path of what belongs to this model.
        options: Those of the command.
        fit: Called with `announce`, a function that prints what is coming, given
            the steps of an epoch, and with the arguments of `Model.fit` that all
            commands share.

    Returns:
        Seconds of training. The model has its best weights.
    """
    finished = folder / FINISHED
    if finished.exists():
        print(f"{folder} holds a trained model; --overwrite trains it again.")
        model.load_weights(folder / WEIGHTS)
        return json.loads(finished.read_text())["training_seconds"]
    best = min(
        (row["val_perplexity"] for row in read_history(folder)), default=math.inf
    )

    def announce(steps):
        print(
            f"{model.name}: {model.count_params():,} parameters; {steps:,} steps an "
            f"epoch, at most {options.epochs} epochs.",
            flush=True,
        )

    fit(
        announce,
        epochs=options.epochs,
        shuffle=False,
        verbose=options.verbose,
        callbacks=[
            *usage_callbacks(model, folder),
            *callbacks(folder, best, options.patience),
        ],
    )
    seconds = sum(row["seconds"] for row in read_history(folder))
    finished.write_text(json.dumps({"training_seconds": seconds}) + "\n")
    shutil.rmtree(folder / BACKUP, ignore_errors=True)
    model.load_weights(folder / WEIGHTS)
    return seconds


def print_files(rows):
    """Lists files, each with what it is."""
    print("\nFiles:")
    for path, text in rows:
        print(f"  {path!s:<44} {text}")


def usage_callbacks(model, folder):
    """What watches the experts, first, so that the history has its figures too."""
    if not any(layer.num_experts > 1 for layer in model.moe_layers):
        return []
    drawn = importlib.util.find_spec("matplotlib") is not None
    return [
        telemetry.ExpertUsage(
            folder / TENSORBOARD, picture=folder / USAGE_PICTURE if drawn else None
        )
    ]


def usage_files(folder):
    """Those that `usage_callbacks` wrote, each with what it is."""
    described = (
        (folder / USAGE_PICTURE, "picture of the experts' load over the steps"),
        (folder / TENSORBOARD, "balance and histograms: tensorboard --logdir"),
    )
    return [(path, text) for path, text in described if path.exists()]


def callbacks(folder, best, patience):
    """Those of every run: best weights, noise, history, resumption, early stop."""
    # A run that goes on measures itself against its best epoch before.
    known = {} if math.isinf(best) else {"baseline": best}
    return [
        keras.callbacks.ModelCheckpoint(
            folder / WEIGHTS,
            monitor="val_perplexity",
            mode="min",
            save_best_only=True,
            save_weights_only=True,
            initial_value_threshold=best,
        ),
        NoiseOfEpoch(),
        History(folder / HISTORY),
        keras.callbacks.BackupAndRestore(
            folder / BACKUP, double_checkpoint=True, delete_checkpoint=False
        ),
        keras.callbacks.EarlyStopping(
            "val_perplexity", patience=patience, mode="min", **known
        ),
    ]
