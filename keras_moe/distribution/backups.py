"""What a training goes on from after an interruption: the last epochs, whole."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import tensorflow as tf

from keras_moe import writing

_NAME = re.compile(r"epoch_(\d+)\.weights\.h5")
_DIGEST = ".sha256"
_CHUNK = 1 << 20
# For each variable, of what HDF5 writes beside its numbers.
_HEADER_BYTES = 4096


class Backup(keras.callbacks.Callback):
    """Keeps the state of the last two epochs, and lets `fit` go on from there.

    Weights and optimizer are written at the end of every epoch to one file, as a whole
    or not at all, with its SHA-256 beside it. `fit` begins after the last epoch of which
    all processes of the strategy have a whole file: a file that is cut short or
    changed is passed over, with a line that says so, and a process that was killed
    before it wrote takes the others back to the epoch before.

    Keras' `BackupAndRestore` writes in place, and each process goes on from what it
    has itself.

    The random generators of the layers are set to what belongs to an epoch at its
    beginning, since Keras does not save their state. With batches in an order that does
    not depend on earlier epochs, a training that was interrupted ends with the weights
    of one that was not.

    Args:
        folder: Str or path, the same in all processes. All but the first of a
            `MultiWorkerMirroredStrategy` write to `worker_1` in it, and so on. Files
            stay there after the training; delete them to train from the start.

    Raises:
        ValueError: `fit` finds no file that is whole, or files of different trainings;
            or a DTensor mesh has several clients.
        writing.NoRoomError: The disk is full. The files before are kept.

    Example:

    >>> import tempfile
    >>> x = np.ones((8, 3), "float32")
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     backup = keras_moe.distribution.Backup(folder)
    ...     first = model.fit(x, x[:, :1], epochs=2, callbacks=[backup], verbose=0)
    ...     more = model.fit(x, x[:, :1], epochs=3, callbacks=[backup], verbose=0)
    >>> first.epoch, more.epoch
    ([0, 1], [2])
    """

    def __init__(self, folder: str | os.PathLike):
        super().__init__()
        self.folder = folder
        self._own = Path(folder)

    def on_train_begin(self, logs=None):
        strategy = self.model.distribute_strategy
        if tf.experimental.dtensor.num_clients() > 1:
            raise ValueError(
                "`Backup` takes one client of a DTensor mesh. Received: "
                f"{tf.experimental.dtensor.num_clients()} clients. Use "
                "keras.callbacks.BackupAndRestore in a folder of each."
            )
        index = index_of(strategy)
        self._own = Path(self.folder)
        if index:
            self._own /= f"worker_{index}"
        done = agreed(self._own, strategy, f"Delete {self.folder} to start again.")
        if not done:
            return
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        path = files(self._own)[done]
        try:
            self.model.load_weights(path)
        except Exception as error:  # Keras fails in many ways on another model
            raise ValueError(
                f"{path} is whole, but not of this model. Received: "
                f"{type(error).__name__}: {error}. Choose another `folder`."
            ) from error
        self.model._initial_epoch = done

    def on_epoch_begin(self, epoch, logs=None):
        set_noise(self.model, epoch)

    def on_epoch_end(self, epoch, logs=None):
        write(self.model, self._own, epoch + 1)


def index_of(strategy: Any) -> int:
    """Which of the processes of a strategy this one is."""
    resolver = getattr(strategy, "cluster_resolver", None)
    return getattr(resolver, "task_id", None) or 0


def set_noise(model: keras.Model, epoch: int) -> None:
    """Sets the random generators of the layers to what belongs to an epoch.

    Keras does not save their states. With the epoch in their counters a run that
    goes on after an interruption draws the noise it would have drawn without.
    """
    for variable in model.variables:
        if variable.path.endswith("seed_generator_state"):
            seed = keras.ops.convert_to_numpy(variable)[0]
            variable.assign([seed, epoch << 20])


def write_weights(model: keras.Model, path: Path) -> None:
    """Writes weights and optimizer, as a whole or not at all.

    Raises:
        NoRoomError: The disk is full.
    """
    with writing.written_beside(path) as partial:
        _write_partial(model, partial)


def _write_partial(model, partial):
    optimizer = model.optimizer
    variables = [*model.variables, *(optimizer.variables if optimizer else ())]
    numbers = sum(
        tf.TensorShape(v.shape).num_elements() * tf.as_dtype(v.dtype).size
        for v in variables
    )
    partial.unlink(missing_ok=True)
    writing.verify_room(partial, numbers + _HEADER_BYTES * (len(variables) + 1))
    model.save_weights(partial, overwrite=True)


def write(model: keras.Model, folder: Path, epochs: int) -> None:
    """Writes what a training goes on from, and deletes all but the epoch before.

    One file holds all of it and has the number of epochs in its name, so that no
    interruption can leave the weights of one epoch with the number of another. The
    file before is for damage to this one, and for processes of which another did not
    get as far.

    Args:
        model: The model.
        folder: Of this process; made if missing.
        epochs: Int. Number of epochs done.

    Raises:
        NoRoomError: The disk is full. The files before are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch_{epochs}.weights.h5"
    with writing.written_beside(path) as partial:
        _write_partial(model, partial)
        # First: no file is ever without, and with that of another it isn't used.
        writing.write_text(_digest_of(path), f"{_sha256(partial)}  {path.name}\n")
    for number, old in files(folder).items():
        if number not in (epochs - 1, epochs):
            old.unlink()
            _digest_of(old).unlink(missing_ok=True)


def files(folder: Path) -> dict[int, Path]:
    """Files that a training may go on from, by the number of epochs done."""
    return {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    }


def damage(path: Path) -> str | None:
    """What is wrong with a file that a training may go on from; None if it is whole.

    Files of earlier versions have no digest: they are read to the end.
    """
    try:
        digest = _digest_of(path)
        match = digest.is_file() and re.match(r"[0-9a-f]{64}\b", digest.read_text())
        if match:
            found = _sha256(path)
            return None if found == match[0] else "it is not what was written"
        with h5py.File(path) as file:
            file.visititems(_read)
    # Libraries fail in every way on what they did not write.
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return None


def _read(name, item):
    if isinstance(item, h5py.Dataset):
        item[()]


def _digest_of(path):
    return path.with_name(path.name + _DIGEST)


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def agreed(folder: Path, strategy: Any, remedy: str) -> int:
    """The number of epochs after which all processes of a strategy can go on.

    All processes must call it.

    Args:
        folder: Where this process writes.
        strategy: That of the model, or None.
        remedy: What to do where none can.

    Returns:
        The number of epochs done, of the last file that is whole in all processes; 0
        if there is none yet.

    Raises:
        ValueError: A process has no file that is whole, or they are of different
            trainings.
    """
    for left in folder.glob(f"{writing.PARTIAL}epoch_*") if folder.is_dir() else ():
        left.unlink()
    found = files(folder)
    damages = {number: damage(path) for number, path in sorted(found.items())}
    whole = [number for number, reason in damages.items() if reason is None]
    is_lost = bool(found) and not whole
    workers = gathered([*[0, 0, *whole][-2:], is_lost], strategy)
    if any(row[-1] for row in workers):
        numbers = [index for index, row in enumerate(workers) if row[-1]]
        where = f"worker {', '.join(map(str, numbers))}" if len(workers) > 1 else "none"
        own = "".join(f"; {found[n]}: {damages[n]}" for n in found if is_lost)
        raise ValueError(
            "What a training goes on from must be whole in one epoch of the last two, "
            f"in every process. Received: damaged files only ({where}{own}). {remedy}"
        )
    common = set.intersection(*(set(row[:2]) for row in workers)) - {0}
    newest = [row[1] for row in workers]
    if not common and max(newest) > 1:
        raise ValueError(
            f"The folders of the workers beside {folder} do not belong together. "
            f"Received: {newest} epochs to go on from. {remedy}"
        )
    done = max(common, default=0)
    for number, reason in damages.items():
        if number > done and reason is not None:
            print(f"{found[number]} is damaged ({reason}): going on after {done}.")
    return done


def gathered(values: Sequence[int], strategy: Any) -> list[tuple[int, ...]]:
    """What every process of a strategy has given, in the order of the processes.

    All processes must call it, each with as many numbers.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return [tuple(values)]

    def gather():
        context = tf.distribute.get_replica_context()
        return context.all_gather(tf.constant([values], tf.int32), axis=0)

    found = strategy.experimental_local_results(strategy.run(gather))[0]
    return [tuple(row) for row in found.numpy().tolist()]
