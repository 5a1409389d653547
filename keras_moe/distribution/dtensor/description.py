"""What lives where on a mesh: a table of a model's variables and their layouts."""

import math
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_moe.distribution.dtensor.groups import groups_of
from keras_moe.distribution.dtensor.variables import LaidOutVariable
from keras_moe.distribution.messages import as_table


class LaidOut(NamedTuple):
    """One variable on a mesh.

    Attributes:
        path: Path of the Keras variable.
        kind: `"weight"` or `"optimizer"`.
        shape: Shape of the whole, as Python sees it.
        layout: For each axis the axis of the mesh it is sharded over, or
            `"unsharded"`.
        device_bytes: Bytes of it on each device, the padding of a shard included.
    """

    path: str
    kind: str
    shape: tuple
    layout: tuple
    device_bytes: int


class Layouts(NamedTuple):
    """Where the variables of a model on a mesh live. Prints as a table.

    Attributes:
        variables: A `LaidOut` for each weight and each slot of the optimizer.
        num_devices: Devices of the mesh.
        num_groups: Groups of them, each of which holds all experts.
    """

    variables: tuple[LaidOut, ...]
    num_devices: int
    num_groups: int = 1

    @property
    def device_bytes(self) -> int:
        """Bytes of all variables on each device."""
        return sum(variable.device_bytes for variable in self.variables)

    def __str__(self) -> str:
        rows = [("variable", "kind", "shape", "layout", "bytes a device")]
        for each in self.variables:
            layout = ", ".join(each.layout)
            rows.append(
                (
                    each.path,
                    each.kind,
                    str(each.shape),
                    f"({layout})",
                    f"{each.device_bytes:,}",
                )
            )
        notes = [
            f"Each of {self.num_devices} devices holds {self.device_bytes:,} bytes."
        ]
        if self.num_groups > 1:
            size = self.num_devices // self.num_groups
            notes.append(f"Every {size} devices hold all experts.")
        return as_table(rows, notes)


def is_on_mesh(model: keras.Model) -> bool:
    """Whether the variables of a model have layouts on a mesh."""
    return any(isinstance(v.value, LaidOutVariable) for v in model.variables)


def describe_layouts(model: keras.Model) -> Layouts:
    """The layout of each variable of a model on a mesh, and what it takes there.

    Args:
        model: A Keras model that was built in the scope of a `DTensorStrategy`.

    Returns:
        The `Layouts`; `print` shows a table.
    """
    optimizer: Any = getattr(model, "optimizer", None)
    slots = list(optimizer.variables) if optimizer is not None else []
    found = [
        _laid_out(variable, kind)
        for kind, variables in (("weight", model.variables), ("optimizer", slots))
        for variable in variables
    ]
    mesh = model.variables[0].value.layout.mesh
    return Layouts(tuple(found), mesh.size, groups_of(mesh).number)


def _laid_out(variable, kind):
    value = variable.value
    layout = value.layout
    parts = 1 if layout.is_fully_replicated() else layout.mesh.size
    num_bytes = math.prod(value.shape) * tf.as_dtype(value.dtype).size
    return LaidOut(
        variable.path,
        kind,
        tuple(variable.shape),
        tuple(layout.sharding_specs),
        num_bytes // parts,
    )
