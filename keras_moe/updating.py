"""Weights that are updated within the backward pass: what optimizers and experts share.

An optimizer that wants it says so (`want`). Experts that run in a graph meanwhile note
how they use their kernels (`note_use`), and when their gradients are computed they ask
whether a step is open in that graph (`step_of`): the optimizer opens it where it is
handed the loss, and closes it where it is handed the gradients.
"""

import threading
import weakref
from typing import Any

import tensorflow as tf

from keras_moe import engine

_optimizers: weakref.WeakSet = weakref.WeakSet()
_uses: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # graph -> uses
_here = threading.local()


class Step:
    """A step of an optimizer between its loss and its gradients.

    Attributes:
        optimizer: Has `begin_update(variable)`, which returns what takes the gradients
            of a variable part by part, or None if it does not update that variable.
        updated: The variables that have been updated in the backward pass.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.graph = weakref.ref(engine.current_graph())
        self.updated: list[Any] = []


def is_on_one_device() -> bool:
    """Whether TensorFlow's own steps run here: not of several devices, nor under XLA."""
    return (
        engine.current() is engine.ONE_DEVICE
        and not tf.distribute.has_strategy()
        and not engine.is_compiled_by_xla()
    )


def want(optimizer: Any) -> None:
    """From now on experts are computed so that their kernels can be updated early."""
    _optimizers.add(optimizer)


def is_wanted() -> bool:
    """Whether experts that run here are to note how they use their kernels."""
    return len(_optimizers) > 0 and not tf.executing_eagerly() and is_on_one_device()


def note_use(variable: Any) -> None:
    """Counts a use of a kernel in the graph that is traced here."""
    uses = _uses.setdefault(engine.current_graph(), {})
    uses[id(variable)] = uses.get(id(variable), 0) + 1


def open_step(optimizer: Any) -> None:
    """Called with the loss, before its gradients are computed."""
    _here.step = Step(optimizer) if is_wanted() else None


def close_step(optimizer: Any) -> Step | None:
    """Called with the gradients: the step that was opened in this graph, or None."""
    step = getattr(_here, "step", None)
    _here.step = None
    is_it = step and step.optimizer is optimizer and step.graph() is _graph()
    return step if is_it else None


def step_of(variable: Any) -> Step | None:
    """The step in which a kernel may be updated here: open, and with one use of it."""
    step = getattr(_here, "step", None)
    graph = _graph()
    if step is None or step.graph() is not graph:
        return None
    return step if _uses.get(graph, {}).get(id(variable)) == 1 else None


def _graph():
    return None if tf.executing_eagerly() else engine.current_graph()
