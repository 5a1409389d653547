"""Repairs to Keras' training under a strategy of several replicas."""

import weakref

import keras
import tensorflow as tf

from keras_moe import engine
from keras_moe.distribution import compatibility
from keras_moe.distribution.messages import KEEP_XLA_OFF, does_not_work
from keras_moe.distribution.mirrored.optimization import is_of_experts
from keras_moe.types import at_least_float32

_installed = False


def install() -> None:
    """Makes the repairs. The second call does nothing."""
    global _installed
    if not _installed:
        _install_losses()
        _install_means()
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
        if not engine.current().several_devices:
            return None
        return engine.current_replica()

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


def _install_means():
    """Makes a mean over the batch that over the global batch.

    Keras takes the mean on every replica and then that of the replicas. Where
    they have different numbers of examples, or of tokens that are not masked, this
    is not the mean of all.
    """
    module = compatibility.loss_module
    stock = module.reduce_weighted_values

    def reduce_weighted_values(
        values,
        sample_weight=None,
        mask=None,
        reduction="sum_over_batch_size",
        dtype=None,
    ):
        here = engine.current()
        reduction = module.standardize_reduction(reduction)
        if (
            not getattr(here, "has_layers", False)
            or tf.executing_eagerly()
            or (not here.has_experts and compatibility.is_in_loop())
            or reduction in (None, "none")
            or values.shape.rank == 0
        ):
            return stock(values, sample_weight, mask, reduction, dtype)

        exact = at_least_float32(values.dtype)

        def total(of):
            return tf.cast(stock(of, sample_weight, mask, "sum", dtype), exact)

        divisor = tf.constant(1.0, exact)
        if reduction == "mean_with_sample_weight":
            divisor = total(tf.ones_like(values))
        elif reduction != "sum":
            divisor = _num_counted(values, mask, exact)
        own = total(values)
        whole, divisor = tf.unstack(
            here.replicas.sum(tf.stack([tf.stop_gradient(own), divisor]))
        )
        if reduction == "sum":
            divisor = tf.constant(1.0, exact)
        # The value is that of the global batch on every replica, so that what Keras
        # reports is; the gradient is that of the examples here.
        own = tf.math.divide_no_nan(own, divisor)
        share = tf.math.divide_no_nan(whole, divisor) / here.replicas.number
        return tf.cast(own + tf.stop_gradient(share - own), values.dtype)

    module.reduce_weighted_values = reduce_weighted_values


def _num_counted(values, mask, dtype):
    """How many values the mean is over: all, or those that are not masked."""
    count = tf.cast(tf.size(values), dtype)
    if mask is None:
        return count
    mask = tf.cast(mask, dtype)
    size = tf.cast(tf.size(mask), dtype)
    return tf.math.divide_no_nan(count, size) * tf.reduce_sum(mask)


def _install_refusals():
    kind = compatibility.TensorFlowTrainer
    stock = kind._make_function

    def _make_function(self, step_function):
        if any(is_of_experts(v) for v in self.variables):
            for name, wanted, remedy in (
                ("run_eagerly", self.run_eagerly, "leave it False"),
                ("jit_compile", self.jit_compile, KEEP_XLA_OFF),
                ("steps_per_execution", self.steps_per_execution > 1, "set it to 1"),
            ):
                if wanted:
                    raise does_not_work(
                        name,
                        getattr(self, name),
                        self.name,
                        "with experts or words on several replicas",
                        remedy,
                    )
        return stock(self, step_function)

    kind._make_function = _make_function
