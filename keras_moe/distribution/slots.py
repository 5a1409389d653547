"""Optimizer state of sharded weights, sharded as they are, under either engine."""

from typing import Any

import keras

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


def verify_untouched_rows(optimizer: Any, variables: list) -> None:
    """Raises where an optimizer would update some rows of a sharded table only.

    Args:
        optimizer: A Keras optimizer, maybe a `FactoredAdam`.
        variables: The Keras variables that it is built for.
    """
    kept = getattr(optimizer, "untouched_rows", "decay")
    tables = [v.path for v in variables if getattr(v, "is_table", False)]
    if tables and kept != "decay":
        raise ValueError(
            "`untouched_rows` must be 'decay' where the vocabulary is sharded: each "
            "device updates all of its words. Received: "
            f"untouched_rows={kept!r} for {tables[0]!r}. Leave it out, or do not call "
            "`shard_vocabulary`."
        )


def verify_factored(optimizer: Any, variable: Any, shape: tuple) -> None:
    """Raises where state would average over the words of a sharded table.

    Args:
        optimizer: The optimizer that will own the state.
        variable: The sharded weight.
        shape: Of the state.
    """
    if getattr(variable, "is_table", False):
        raise ValueError(
            "A table whose words are shared out must have state for each of its numbers. "
            f"Received: {type(optimizer).__name__} with state of shape {tuple(shape)} "
            f"for {variable.path!r} of shape {tuple(variable.shape)}. Factor the kernels "
            "of the experts only."
        )


def build_adafactor(optimizer: Any, variables: list) -> None:
    """As `Adafactor.build`, in the same order, with rows and columns sharded too.

    Args:
        optimizer: A `keras.optimizers.Adafactor`, not built yet.
        variables: Its weights. Those of rank 3 and more keep sharded factors.
    """
    compatibility.BaseOptimizer.build(optimizer, variables)
    optimizer._r, optimizer._c, optimizer._v = [], [], []
    for variable in variables:
        shape = tuple(variable.shape)
        sharded = hasattr(variable, "sharded_alike") and len(shape) >= 3
        for factors, size in (
            (optimizer._r, shape[:-1]),
            (optimizer._c, (*shape[:-2], *shape[-1:])),
        ):
            if sharded:
                slot = make_slot(optimizer, variable, variable.name, shape=size)
                factors.append(slot)
            elif len(shape) < 2:
                factors.append(keras.Variable(0, name=variable.name, trainable=False))
            else:
                factors.append(
                    optimizer.add_variable(
                        shape=size, dtype=variable.dtype, name=variable.name
                    )
                )
        optimizer._v.append(optimizer.add_variable_from_reference(variable, "velocity"))


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
