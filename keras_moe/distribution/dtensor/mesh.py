"""Meshes of devices, and the conditions under which DTensor's results are right.

TensorFlow's DTensor has two settings that make wrong results without a word: an
optimization that moves reads of a variable past later writes, and an asynchronous
mode in which a failing operation does not raise. Both are set here while that is
possible, and then tried out on the mesh.
"""

import os
from collections.abc import Sequence

import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe import checks
from keras_moe.distribution import compatibility

# The name of the one axis of a mesh: the batch is sharded over it, and the experts.
AXIS = "expert"

# With this optimization on, a read of a variable can give a value of an earlier step.
SWITCH = "DTENSOR_ENABLE_COMBINE_ALL_REDUCES_OPTIMIZATION"


def create_mesh(
    num_devices: int | None = None,
    *,
    devices: Sequence[str] | None = None,
    device_type: str | None = None,
) -> dtensor.Mesh:
    """Makes a mesh of one axis over the devices of this process, or of several.

    With several processes (clients) the environment says who they are, as for every
    DTensor program: `DTENSOR_JOBS`, a list of `host:port`, `DTENSOR_NUM_CLIENTS`,
    `DTENSOR_CLIENT_ID`, and `DTENSOR_JOB_NAME`. Every client then calls this with
    the same arguments, before it makes any tensor.

    Args:
        num_devices: Int or None. Devices of this process to use, the first ones;
            None uses all. Defaults to `None`.
        devices: Their names, such as `["CPU:0", "CPU:1"]`, instead of a number.
            Defaults to `None`.
        device_type: `"CPU"` or `"GPU"`. None means GPU if there is one. Defaults
            to `None`.

    Returns:
        A `dtensor.Mesh` with the axis `"expert"`.

    Raises:
        ValueError: There are not so many devices, both `num_devices` and
            `devices` are given, or DTensor's settings cannot be mended any more.

    Example:

    >>> mesh = keras_moe.distribution.create_mesh(1, device_type="CPU")
    >>> mesh.size
    1
    """
    if num_devices is not None and devices is not None:
        raise ValueError(
            "`num_devices` and `devices` exclude each other. Received: "
            f"num_devices={num_devices}, devices={list(devices)}. Leave one out."
        )
    if num_devices is not None:
        num_devices = checks.verify_int(num_devices, "num_devices")
    set_switch()
    if devices is not None:
        devices = checks.verify_texts(devices, "devices")
        device_type = devices[0].split(":")[0]
    elif device_type is None:
        device_type = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    several = dtensor.num_clients() > 1
    if several and not compatibility.dtensor_is_initialized():
        dtensor.initialize_accelerator_system(
            device_type, enable_coordination_service=True
        )
    compatibility.start_dtensor_device()
    found = list(dtensor.local_devices(device_type))
    if devices is not None:
        found = [tf.DeviceSpec.from_string(_device_name(d)) for d in devices]
    wanted = len(found) if num_devices is None else num_devices
    if not 1 <= wanted <= len(found):
        raise ValueError(
            "`num_devices` must be between 1 and the number of devices. Received: "
            f"num_devices={num_devices}, {len(found)} of type {device_type}. For "
            "several CPU devices call "
            "`tf.config.set_logical_device_configuration` first."
        )
    names = [f"{d.device_type}:{d.device_index}" for d in found[:wanted]]
    if several:
        size = wanted * dtensor.num_clients()
        return dtensor.create_distributed_mesh(
            [(AXIS, size)], local_devices=names, device_type=device_type
        )
    return dtensor.create_mesh([(AXIS, wanted)], devices=names)


def _device_name(device):
    return device if device.startswith("/") else f"/device:{device}"


def set_switch() -> None:
    """Turns the reordering optimization off, before DTensor looks at the setting.

    Raises:
        ValueError: The environment turns it on.
    """
    value = os.environ.setdefault(SWITCH, "0")
    if value != "0":
        raise ValueError(
            f"The environment variable {SWITCH} must be exactly 0: otherwise reads "
            f"of variables give values of an earlier step. Received: {value!r}. Unset "
            "it before Python starts."
        )


def verify_mesh(mesh: dtensor.Mesh) -> None:
    """Checks that a mesh is of a kind that gives right results.

    Raises:
        ValueError: It is not a mesh, or it has more than one axis.
    """
    if not isinstance(mesh, dtensor.Mesh):
        raise ValueError(
            "`mesh` must be a dtensor.Mesh, as `keras_moe.distribution.create_mesh` "
            f"makes it. Received: {mesh!r}."
        )
    if len(mesh.dim_names) != 1:
        sizes = {name: mesh.dim_size(name) for name in mesh.dim_names}
        raise ValueError(
            "`mesh` must have one axis: on a mesh of two axes TensorFlow's relayout "
            f"returns wrong data. Received: {sizes}. Use "
            "`keras_moe.distribution.create_mesh`."
        )


def verify_settings(mesh: dtensor.Mesh) -> None:
    """Tries out on the mesh that reads are current and that failures raise.

    Raises:
        ValueError: One of them does not hold, with what to do about it.
    """
    set_switch()
    if not reads_are_current(mesh):
        raise ValueError(
            f"The environment variable {SWITCH} was set too late: DTensor had run "
            "before, and reads of variables give values of an earlier step. "
            "Received: a stale read in a trial. Set it to 0 before Python starts, "
            "or call `keras_moe.distribution.create_mesh` before any other use of "
            "DTensor."
        )
    if not failures_raise(mesh):
        raise ValueError(
            "DTensor runs asynchronously, and a failing operation would go "
            "unnoticed. Received: a failing operation that did not raise in a trial. "
            "Call `keras_moe.distribution.create_mesh` before any other use of "
            "DTensor in this process."
        )


def reads_are_current(mesh: dtensor.Mesh) -> bool:
    """Whether a variable that was written in a step reads as written in that step."""
    layout = dtensor.Layout.replicated(mesh, 0)
    zero = dtensor.call_with_layout(tf.zeros, layout, shape=())
    first, second = dtensor.DVariable(zero), dtensor.DVariable(zero)
    sharded = dtensor.Layout([mesh.dim_names[0]], mesh)
    ones = dtensor.call_with_layout(tf.ones, sharded, shape=(mesh.size,))

    @tf.function
    def step(ones):
        # Two sums over the mesh that the optimization would combine into one,
        # which comes after the read.
        total = tf.reduce_sum(ones)
        first.assign(total)
        second.assign(tf.reduce_sum(ones * 2.0))
        return first.read_value() - total

    if mesh.size == 1:
        return True
    first.assign(zero)
    return float(dtensor.unpack(step(ones))[0]) == 0.0


def failures_raise(mesh: dtensor.Mesh) -> bool:
    """Whether an operation that fails on the devices raises where it is called."""
    layout = dtensor.Layout.replicated(mesh, 0)
    zero = dtensor.call_with_layout(lambda: tf.zeros((), tf.int32), layout)

    @tf.function
    def divide(zero):
        return 1 // zero

    try:
        divide(zero)
    except (tf.errors.InvalidArgumentError, tf.errors.UnknownError):
        return True
    return False
