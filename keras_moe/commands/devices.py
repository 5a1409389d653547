"""The devices and processes that a command trains on."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from keras_moe import checks, distribution
from keras_moe.commands import folders
from keras_moe.distribution import backups, launcher, lost_workers

_MIRRORED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


def launch_workers(options: Any) -> bool:
    """Starts the command again in several processes, if it is to run so.

    Args:
        options: Those of the command, with `workers`, `devices`, `dtensor`,
            `expert_parallel_size` and `output_dir`.

    Returns:
        Whether this process has only waited for others, and has nothing to do.

    Raises:
        ValueError: A number is below 1, two are given, `expert_parallel_size` does not
            divide that of the devices, `shard_vocabulary` has no devices or another way
            to update words, or a process failed.
    """
    given = {
        name: getattr(options, name)
        for name in ("devices", "workers", "dtensor")
        if getattr(options, name, None) is not None
    }
    for name, value in given.items():
        checks.verify_positive_int(value, name)
    if len(given) > 1:
        named = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            "`devices`, `workers` and `dtensor` exclude each other. Received: "
            f"{named}. Leave all but one out."
        )
    _verify_size(options)
    _verify_vocabulary(options)
    if options.workers is None or "TF_CONFIG" in os.environ:
        return False
    folder = Path(options.output_dir)
    for index in range(options.workers):
        folders.check_folder(options, _folder_of(folder, index))
    logs = folder.with_name(f"{folder.name}_logs")
    print(
        f"Starting {options.workers} processes; all but the first write to {logs}.",
        flush=True,
    )
    status, failed = launcher.run_workers(
        ["-m", "keras_moe", *sys.argv[1:]], options.workers, logs
    )
    if status:
        raise ValueError(
            f"A process of `workers` failed. Received: exit status {status}. {failed} "
            f"{folders.GOES_ON}"
        )
    return True


def make_strategy(options: Any) -> Any:
    """The strategy of a command's options; None for one device.

    Must come before TensorFlow touches its devices.

    Raises:
        ValueError: The CPU can no longer be split.
    """
    strategy, size = _strategy_of(options), options.expert_parallel_size
    if size is not None and isinstance(strategy, _MIRRORED):
        distribution.set_expert_parallel_size(strategy, size)
    if getattr(options, "shard_vocabulary", False):
        distribution.shard_vocabulary(strategy)
    return strategy


def _verify_size(options):
    size = options.expert_parallel_size
    if size is None:
        return
    size = checks.verify_positive_int(size, "expert_parallel_size")
    if options.workers is not None:  # each may have several devices
        return
    name = "devices" if options.dtensor is None else "dtensor"
    number = getattr(options, name) or 1
    if number % size:
        raise ValueError(
            f"`expert_parallel_size` must divide `{name}`. Received: "
            f"expert_parallel_size={size}, {name}={number}. Each group of devices holds "
            "all experts, so groups are equal."
        )


def _verify_vocabulary(options):
    if not getattr(options, "shard_vocabulary", False):
        return
    places = {
        name: getattr(options, name) for name in ("devices", "workers", "dtensor")
    }
    if max(number or 1 for number in places.values()) == 1:
        raise ValueError(
            "`shard_vocabulary` needs several devices to share the words. Received: "
            "shard_vocabulary=True, "
            f"{', '.join(f'{k}={v}' for k, v in places.items())}. Set one of these, or "
            "leave `shard_vocabulary` out."
        )
    if options.num_sampled is not None and options.untouched_rows != "decay":
        raise ValueError(
            "`untouched_rows` must be 'decay' with `shard_vocabulary`, where each device "
            f"updates all of its words. Received: {options.untouched_rows!r}. Leave one "
            "of the two out."
        )


def _strategy_of(options):
    if options.workers is not None:
        return tf.distribute.MultiWorkerMirroredStrategy()
    on_mesh = getattr(options, "dtensor", None)
    if on_mesh is not None:
        made_with = {"expert_parallel_size": options.expert_parallel_size}
        if len(tf.config.list_physical_devices("GPU")) < on_mesh:
            _split_cpu(on_mesh, "dtensor")
            made_with["device_type"] = "CPU"
        mesh = distribution.create_mesh(on_mesh, **made_with)
        return distribution.DTensorStrategy(mesh)
    if options.devices is None or options.devices == 1:
        return None
    gpus = tf.config.list_logical_devices("GPU") if _has_gpus(options) else []
    if gpus:
        names = [device.name for device in gpus[: options.devices]]
    else:
        _split_cpu(options.devices, "devices")
        names = [f"CPU:{i}" for i in range(options.devices)]
    return tf.distribute.MirroredStrategy(names)


@contextlib.contextmanager
def lost_workers_named(strategy: Any) -> Iterator[None]:
    """Inside, the error of a lost worker is a `ValueError` that says which it was."""
    try:
        yield
    except tf.errors.OpError as error:
        lost = lost_workers.describe(error, strategy)
        if lost is None:
            raise
        raise ValueError(f"{lost} {folders.GOES_ON}") from error


def scope_of(strategy: Any) -> contextlib.AbstractContextManager:
    """The scope to build and compile a model in."""
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def own_folder(folder: Path, strategy: Any) -> Path:
    """Where this process writes: the others write beside what the first writes."""
    return _folder_of(folder, backups.index_of(strategy))


def _folder_of(folder, index):
    return folder if index == 0 else folder.with_name(f"{folder.name}_worker_{index}")


def _has_gpus(options):
    return len(tf.config.list_physical_devices("GPU")) >= options.devices


def _split_cpu(count, option):
    cpu = tf.config.list_physical_devices("CPU")[0]
    present = tf.config.get_logical_device_configuration(cpu)
    if present is not None and len(present) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as error:
        raise ValueError(
            f"`{option}` must be set before TensorFlow runs anything. Received: "
            f"{option}={count} in a process whose CPU is in use as one device. Start "
            "the command in a process of its own."
        ) from error
