"""Meshes of devices, and the conditions under which DTensor's results are right.

TensorFlow's DTensor has two settings that make wrong results without a word: an
optimization that moves reads of a variable past later writes, and an asynchronous
mode in which a failing operation does not raise. Both are set here while that is
possible, and then tried out on the mesh; so is the exchange of rows, which goes to the
wrong devices where those of a mesh are not in order.
"""

import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe import checks
from keras_moe.distribution import compatibility
from keras_moe.distribution.dtensor.groups import groups_of, name_of

# The name of the one axis of a mesh: the batch is sharded over it, and the experts.
AXIS = "expert"

# With this optimization on, a read of a variable can give a value of an earlier step.
SWITCH = "DTENSOR_ENABLE_COMBINE_ALL_REDUCES_OPTIMIZATION"


def create_mesh(
    num_devices: int | None = None,
    *,
    devices: Sequence[str] | None = None,
    device_type: str | None = None,
    expert_parallel_size: int | None = None,
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
        expert_parallel_size: Int or None. P, devices that hold all experts together
            and exchange tokens; divides the devices of the mesh, those of all
            processes. The next P devices hold all experts again, and gradients of
            the copies are summed. None means all devices: each expert is held once.
            Defaults to `None`.

    Returns:
        A `dtensor.Mesh` with the axis `"expert"`. Its name says
        `expert_parallel_size`.

    Raises:
        ValueError: There are not so many devices, both `num_devices` and
            `devices` are given, `expert_parallel_size` does not divide the devices,
            or DTensor's settings cannot be mended any more.

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
    if expert_parallel_size is not None:
        expert_parallel_size = checks.verify_positive_int(
            expert_parallel_size, "expert_parallel_size"
        )
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
    size = wanted * dtensor.num_clients()
    if size % (expert_parallel_size or 1):
        raise ValueError(
            "`expert_parallel_size` must divide the number of devices of the mesh. "
            f"Received: expert_parallel_size={expert_parallel_size}, {size} devices. "
            "Leave it out for one group of all devices."
        )
    name = name_of(expert_parallel_size if expert_parallel_size != size else None)
    if several:
        return dtensor.create_distributed_mesh(
            [(AXIS, size)], name, local_devices=names, device_type=device_type
        )
    return dtensor.create_mesh([(AXIS, size)], name, devices=names)


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
            "`mesh` must have one axis, over which the batch is sharded: DTensor "
            f"cannot shard it over two. Received: {sizes}. Use "
            "`keras_moe.distribution.create_mesh`, for groups of devices that hold "
            "all experts with `expert_parallel_size`."
        )


def verify_settings(mesh: dtensor.Mesh) -> None:
    """Tries out on the mesh that reads are current, failures raise, and rows arrive.

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
    if not rows_arrive(mesh):
        raise ValueError(
            "`mesh` must have its devices in the order of their numbers: TensorFlow "
            "exchanges rows in that order, whatever the mesh says. Received: rows on "
            f"wrong devices in a trial, devices {mesh.local_devices()}. Sort "
            "`devices` of `keras_moe.distribution.create_mesh`."
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


def rows_arrive(mesh: dtensor.Mesh) -> bool:
    """Whether an exchange takes rows to the devices of their experts, and back.

    So with the sums over the copies of experts, where there are any.
    """
    groups = groups_of(mesh)
    number, size = groups.number, groups.size
    # For each device a row for the one expert of each device of its group.
    rows = np.arange(1.0, mesh.size * size + 1.0, dtype="float32")
    rows = rows.reshape(number, size, size)
    arrived = rows.transpose(0, 2, 1)
    summed = np.broadcast_to(arrived.sum(0), arrived.shape)
    zero = dtensor.call_with_layout(tf.zeros, dtensor.Layout.replicated(mesh, 0), ())

    @tf.function
    def largest_error(zero):
        def laid_out(value, rank):
            value = tf.constant(value.reshape(mesh.size, size, *[1] * (rank - 2)))
            return dtensor.relayout(value + zero, groups.layout(rank))

        sent = laid_out(rows, 4)
        moved = groups.to_experts(sent)
        back = groups.to_tokens(moved)
        total = groups.sum_of_copies(moved)
        pairs = (
            (moved, laid_out(arrived, 3)),
            (back, sent),
            (total, laid_out(summed, 3)),
        )
        return tf.add_n([tf.reduce_max(tf.abs(a - b)) for a, b in pairs])

    return mesh.size == 1 or float(dtensor.unpack(largest_error(zero))[0]) == 0.0
