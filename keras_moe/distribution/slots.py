"""Optimizer state of sharded weights, sharded as they are, under either engine."""

from typing import Any

from keras_moe.distribution import compatibility

_installed = False


def make_slot(
    optimizer: Any,
    variable: Any,
    name: str,
    initializer: Any = "zeros",
    shape: tuple | None = None,
) -> Any:
    """Makes optimizer state for a sharded weight.

    Args:
        optimizer: The optimizer that will own it.
        variable: The weight, an `ExpertVariable` or `LaidOutExperts`.
        name: Name of the slot.
        initializer: Keras initializer. Defaults to `"zeros"`.
        shape: `(E, ...)`; None means that of the weight. Defaults to `None`.

    Returns:
        The slot, a variable of the kind of the weight, tracked by the optimizer.
    """
    shape = tuple(variable.shape) if shape is None else tuple(shape)
    with compatibility.layer_name_scope(optimizer):
        slot = variable.sharded_alike(
            initializer, shape, dtype=variable.dtype, trainable=False, name=name
        )
    return compatibility.track_weight(optimizer, slot)


def install() -> None:
    """Makes optimizers use `make_slot` for sharded weights. Once is enough."""
    global _installed
    if _installed:
        return
    kind = compatibility.TFOptimizer
    stock = kind.add_variable_from_reference

    def add_variable_from_reference(
        self, reference_variable, name=None, initializer="zeros"
    ):
        if not hasattr(reference_variable, "sharded_alike"):
            return stock(self, reference_variable, name, initializer)
        path = reference_variable.path.replace("/", "_")
        return make_slot(
            self, reference_variable, f"{path}_{name or 'var'}", initializer
        )

    kind.add_variable_from_reference = add_variable_from_reference
    _installed = True
