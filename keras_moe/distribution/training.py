"""Repairs to Keras' training under a strategy of several replicas."""

import weakref

import keras
import tensorflow as tf

from keras_moe import placement
from keras_moe.distribution import compatibility
from keras_moe.distribution.expert_variable import ExpertVariable

_installed = False


def install() -> None:
    """Makes the repairs. The second call does nothing."""
    global _installed
    if not _installed:
        _install_losses()
        _install_refusals()
    _installed = True


# For each layer and replica the losses added in the present call.
_losses: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _install_losses():
    """Keeps the losses of a layer for every replica by itself.

    Replicas are threads over the same layer objects. Where one stops in the middle
    of a call (a synchronized batch normalization does), another would add to its
    list of losses or clear it.
    """
    kind = keras.layers.Layer
    stock_add, stock_get = kind.add_loss, kind._get_own_losses
    stock_clear = kind._clear_losses

    def replica():
        if compatibility.in_stateless_scope():
            return None
        if placement.for_call() is placement.ONE_DEVICE:
            return None
        return placement.current_replica()

    def add_loss(self, loss):
        number = replica()
        if number is None:
            return stock_add(self, loss)
        own = _losses.setdefault(self, {}).setdefault(number, [])
        own.extend(tf.nest.flatten(loss))
        return None

    def _get_own_losses(self):
        number = replica()
        if number is None:
            return stock_get(self)
        return list(_losses.get(self, {}).get(number, ()))

    def _clear_losses(self):
        number = replica()
        if number is not None:
            _losses.get(self, {}).pop(number, None)
        stock_clear(self)

    kind.add_loss, kind._get_own_losses = add_loss, _get_own_losses
    kind._clear_losses = _clear_losses


def _install_refusals():
    kind = compatibility.TensorFlowTrainer
    stock = kind._make_function

    def _make_function(self, step_function):
        if any(isinstance(v, ExpertVariable) for v in self.variables):
            for name, wanted, remedy in (
                ("run_eagerly", self.run_eagerly, "leave it False"),
                ("jit_compile", self.jit_compile, 'leave it "auto" or set it False'),
                ("steps_per_execution", self.steps_per_execution > 1, "set it to 1"),
            ):
                if wanted:
                    raise ValueError(
                        f"`{name}` of `compile` does not work with sharded experts. "
                        f"Received: {name}={getattr(self, name)!r} for "
                        f"{self.name!r}; {remedy}."
                    )
        return stock(self, step_function)

    kind._make_function = _make_function
