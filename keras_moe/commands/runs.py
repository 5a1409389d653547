"""A training that can be interrupted, with the files that it leaves."""

import contextlib
import importlib.util
import math
import shutil
import time
from pathlib import Path

import h5py
import keras

from keras_moe import checks, telemetry, writing
from keras_moe.commands import folders
from keras_moe.commands.folders import BACKUP, FINISHED, HISTORY, WEIGHTS
from keras_moe.commands.options import DTYPES
from keras_moe.distribution import backups

TENSORBOARD, USAGE_PICTURE = "tensorboard", "expert_usage.png"


def verify_numbers(options, names):
    """Raises unless the options named are at least 1; and for the rate and the seed."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(
                f"`{name}` must be at least 1. Received: {name}="
                f"{getattr(options, name)}."
            )
    if not 0 < options.learning_rate < math.inf:
        raise ValueError(
            "`learning_rate` must be a finite number greater than 0. "
            f"Received: learning_rate={options.learning_rate}."
        )
    if not 0 <= options.seed < 2**32:
        raise ValueError(
            f"`seed` must be from 0 to {2**32 - 1}. Received: seed={options.seed}."
        )


def verify_mixture(options):
    """Raises unless Keras knows the activation, and the noise is one."""
    try:
        stddev = options.noise_stddev
    except ValueError:
        stddev = -1.0
    if stddev != "learned" and not 0 <= stddev < math.inf:
        raise ValueError(
            "`noise` must be learned or a number of at least 0. Received: "
            f"noise={options.noise!r}. Pass 0 for none."
        )
    checks.verify_int(options.shared_units, "shared_units", 0)
    checks.verify_rate(options.expert_dropout, "expert_dropout")
    checks.verify_number(options.scaling_factor, "scaling_factor", "(0, inf)")
    for name in ("expert_learning_rate", "gate_learning_rate"):
        rest = ". Pass 1 for the rate of all others."
        checks.verify_number(getattr(options, name), name, rest=rest)
    try:
        keras.activations.get(options.activation)
    except ValueError as error:
        raise ValueError(
            "`activation` must be the name of an activation of Keras. Received: "
            f"activation={options.activation!r}. Use sigmoid, relu or linear, say."
        ) from error


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
    """Sets the random generators of the layers to what belongs to an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        backups.set_noise(self.model, epoch)


class StopDiverged(keras.callbacks.Callback):
    """Ends a training whose loss is no number, before a file is written of it."""

    def __init__(self, options, interval=100):
        super().__init__()
        self.options = options
        self.interval = interval

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        # Here, and seldom: in `on_train_batch_end` Keras would wait for every step.
        if batch and batch % self.interval == 0:
            (loss,) = (m for m in self.model.metrics if m.name == "loss")
            self._verify({"loss": float(loss.result())}, f"{batch} steps of ")

    def on_epoch_end(self, epoch, logs=None):
        self._verify(logs)

    def _verify(self, logs, steps=""):
        for name in ("loss", "val_loss", "val_perplexity"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"The training diverged: `{name}` was {logs[name]} after {steps}"
                    f"epoch {self._epoch + 1}. Received: learning_rate="
                    f"{self.options.learning_rate}, warmup_steps="
                    f"{self.options.warmup_steps}. Lower `learning_rate` or raise "
                    "`warmup_steps`, in another `output_dir` or with --overwrite. The "
                    "run is not finished; what earlier epochs have left is kept."
                )


class KeepBest(keras.callbacks.Callback):
    """Keeps the weights of the best validation; ends when none has come for long.

    Args:
        path: The file of the weights.
        rows: Logs of the epochs before.
        patience: Epochs without a better validation before stopping.
    """

    def __init__(self, path, rows, patience):
        super().__init__()
        self.path = path
        self.patience = patience
        self.best, self.waited = math.inf, 0
        for row in rows:
            self._is_best(row["val_perplexity"])

    @property
    def is_over(self):
        return self.waited >= self.patience

    def on_epoch_end(self, epoch, logs=None):
        if self._is_best(logs["val_perplexity"]):
            backups.write_weights(self.model, self.path)
        elif self.is_over:
            self.model.stop_training = True

    def _is_best(self, perplexity):
        is_best = perplexity < self.best
        self.best = perplexity if is_best else self.best
        self.waited = 0 if is_best else self.waited + 1
        return is_best


class History(keras.callbacks.Callback):
    """Keeps the logs of every epoch in a CSV file, with its time."""

    def __init__(self, folder, rows):
        super().__init__()
        self.folder = folder
        self.rows = list(rows)

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.perf_counter() - self._start
        self.rows.append({"epoch": epoch, "seconds": seconds, **logs})
        folders.write_history(self.folder, self.rows)


class Checkpoint(keras.callbacks.Callback):
    """Keeps what a run goes on from, of the last two epochs."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_epoch_end(self, epoch, logs=None):
        backups.write(self.model, self.folder, epoch + 1)
        for name in _OF_0_1_0:
            for end in ("", _COPY):
                (self.folder / f"{name}{end}").unlink(missing_ok=True)


# What version 0.1.0 has written, in place, with a copy of the epoch before.
_OF_0_1_0, _COPY = ("latest.weights.h5", "training_metadata.json"), ".bkp"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Files that a run can go on from, by the number of epochs done."""
    found = backups.files(folder)
    for end in () if found else ("", _COPY):
        path, epochs = (folder / f"{name}{end}" for name in _OF_0_1_0)
        if epochs.exists() and path.exists() and _opens(path):
            number = folders.read_json(epochs, folders.ANEW).get("epoch")
            if isinstance(number, int) and number > 0:
                found[number] = folder / f"epoch_{number}.weights.h5"
                with writing.written_beside(found[number]) as partial:
                    shutil.copyfile(path, partial)
                break
    return found


def _opens(path):
    try:
        h5py.File(path).close()
    except OSError:  # cut
        return False
    return True


def train(model, folder, options, fit, strategy=None) -> float:
    """Trains, or loads what an earlier run has trained to the end.

    Args:
        model: A compiled model.
        folder: Path of what belongs to this model.
        options: Those of the command.
        fit: Called with `announce`, a function that prints what is coming, given
            the steps of an epoch, and with the arguments of `Model.fit` that all
            commands share.
        strategy: That of the model, or None.

    Returns:
        Seconds of training. The model has its best weights.

    Raises:
        ValueError: A file of the folder is damaged, or the training diverged.
    """
    seconds = folders.finished_seconds(folder)
    workers = backups.gathered([seconds is not None], strategy)
    if seconds is not None and all(finished for (finished,) in workers):
        print(f"{folder} holds a trained model; --overwrite trains it again.")
        folders.load_weights(model, folder / WEIGHTS)
        return seconds
    found = checkpoints(folder / BACKUP)
    done = backups.agreed(folder / BACKUP, strategy, folders.ANEW)
    rows = folders.read_history(folder)[:done]
    if done:
        if len(rows) < done:
            raise folders.damaged(
                folder / HISTORY,
                f"{len(rows)} epochs, where {done} are to go on from",
                folders.ANEW,
            )
        # The best ones too, so that damage is found before the training.
        _load_best(model, folder, rows, found)
        folders.load_weights(model, found[done])

    def announce(steps):
        print(
            f"{model.name}: {model.count_params():,} parameters; {steps:,} steps an "
            f"epoch, at most {options.epochs} epochs.",
            flush=True,
        )

    shared = callbacks(folder, rows, options)
    if done < options.epochs and not any(getattr(c, "is_over", False) for c in shared):
        fit(
            announce,
            epochs=options.epochs,
            initial_epoch=done,
            shuffle=False,
            verbose=options.verbose,
            callbacks=[StopDiverged(options), *usage_callbacks(model, folder), *shared],
        )
    seconds = sum(row["seconds"] for row in folders.read_history(folder))
    folders.load_weights(model, folder / WEIGHTS)
    folders.write_json(folder / FINISHED, {"training_seconds": seconds})
    # Before all workers are finished any of them may have to go on.
    backups.gathered([0], strategy)
    shutil.rmtree(folder / BACKUP, ignore_errors=True)
    return seconds


def _load_best(model, folder, rows, found):
    """Those of the best epoch, also from what the run goes on from if that has them."""
    path = folder / WEIGHTS
    try:
        folders.load_weights(model, path)
    except ValueError:
        best = min(rows, key=lambda row: row["val_perplexity"])["epoch"] + 1
        if best not in found or backups.damage(found[best]) is not None:
            raise
        print(f"{path} is damaged: it is written again from {found[best]}.")
        with writing.written_beside(path) as partial:
            shutil.copyfile(found[best], partial)
        folders.load_weights(model, path)


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


def callbacks(folder, rows, options):
    """Those of every run: best weights, noise, history, resumption.

    Args:
        folder: Path of what belongs to this model.
        rows: Logs of the epochs before.
        options: Those of the command.
    """
    return [
        KeepBest(folder / WEIGHTS, rows, options.patience),
        NoiseOfEpoch(),
        History(folder, rows),
        Checkpoint(folder / BACKUP),
    ]
