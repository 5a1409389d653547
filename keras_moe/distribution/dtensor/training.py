"""What Keras does in a step that DTensor cannot, done another way.

Each of these acts within the steps of a `DTensorStrategy` only:

* a step is traced for every shape of a batch, not for a shape of unknown size;
* recurrent layers are unrolled: the gradient of a loop cannot be expanded;
* random numbers are drawn as one device draws them: told to be sharded, every
  device would draw others;
* slices of the gradient of an embedding are summed by a product: in the stock way
  DTensor gathers them on every device;
* `silu` is the product that it is, with the gradient that follows;
* optimizers keep the state of sharded weights sharded, and norms by which they clip
  count one copy of each expert.
"""

from typing import Any

import keras
import tensorflow as tf
from tensorflow.experimental import dtensor

from keras_moe.distribution import compatibility, slots
from keras_moe.distribution.dtensor import operations
from keras_moe.distribution.dtensor.variables import (
    DENSE_BY,
    LaidOutExperts,
    current_mesh,
    in_step,
)
from keras_moe.distribution.messages import KEEP_XLA_OFF, does_not_work
from keras_moe.engine import Engine

_installed = False


def install() -> None:
    """Makes the changes. The second call does nothing."""
    global _installed
    if not _installed:
        _install_functions()
        _install_recurrence()
        _install_random()
        operations.install()
        _install_silu()
        _install_slices()
        slots.install()
        _install_build()
        _install_clipping()
        _install_adafactor()
    _installed = True


def _is_ours(model):
    engine = getattr(model._distribute_strategy, "engine", None)
    return isinstance(engine, Engine) and engine.static_shapes


def _install_functions():
    kind = compatibility.TensorFlowTrainer
    stock_step, stock_predict = kind._make_function, kind.make_predict_function

    def _make_function(self, step_function):
        if not _is_ours(self):
            return stock_step(self, step_function)
        _verify_compiled(self)
        strategy = self._distribute_strategy

        def one_step(data):
            return strategy.run(step_function, args=(data,))

        run = one_step if self.run_eagerly else _traced_by_shape(one_step)

        def function(iterator):
            outputs = None
            for _, data in zip(range(self.steps_per_execution), iterator, strict=False):
                outputs = run(strategy.lay_out(data))
            if outputs is None:
                raise StopIteration
            return outputs

        return function

    def make_predict_function(self, force=False):
        if not _is_ours(self):
            return stock_predict(self, force)
        if self.predict_function is not None and not force:
            return self.predict_function
        strategy = self._distribute_strategy

        def one_step(data):
            return strategy.run(self.predict_step, args=(data,))

        run = one_step if self.run_eagerly else _traced_by_shape(one_step)

        def function(batches):
            outputs = [run(strategy.lay_out(batch)) for batch in batches]
            return tf.nest.map_structure(_joined, *outputs)

        self.predict_function = function
        return function

    kind._make_function = _make_function
    kind.make_predict_function = make_predict_function


def _traced_by_shape(function):
    return tf.function(function, autograph=False)


def _joined(*parts):
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


def _verify_compiled(model):
    steps = getattr(model.optimizer, "gradient_accumulation_steps", None)
    if steps:
        raise ValueError(
            "`gradient_accumulation_steps` of the optimizer does not work on a mesh, "
            "where DTensor reads stale sums in a condition. Received: "
            f"gradient_accumulation_steps={steps} for {model.name!r}. Leave it out, "
            "or use `tf.distribute.MirroredStrategy`."
        )
    if model.jit_compile is True:
        raise does_not_work("jit_compile", True, model.name, "on a mesh", KEEP_XLA_OFF)


def _install_recurrence():
    stock = keras.layers.RNN.inner_loop

    def unrolled(kind):
        own = kind.inner_loop

        def inner_loop(self, sequences, initial_state, mask, training=False):
            if not in_step():
                return own(self, sequences, initial_state, mask, training)
            if sequences.shape[1] is None:
                raise ValueError(
                    f"`sequences` of {self.name!r} must have a known number of time "
                    "steps on a mesh, where loops are unrolled. Received: shape="
                    f"{sequences.shape}. Pad all to one length, and say it in "
                    "`keras.Input`."
                )
            cells = getattr(self.cell, "cells", ())
            if any(hasattr(cell, "choose") for cell in cells):
                names = [type(cell).__name__ for cell in cells]
                raise ValueError(
                    f"`cell` of {self.name!r} must be one cell where it has a mixture on "
                    "a mesh: DTensor cannot expand the gradient of several in a step. "
                    f"Received: {names}. Make a `keras.layers.RNN` of each cell, one "
                    "after the other: that computes the same."
                )
            if training and not self.unroll and compatibility.moves_in_steps(self):
                # As Keras before a loop, for the shape of the answer: what the gate
                # draws and counts is then that of one device.
                step = getattr(self.cell, "choose", self.cell)
                step(sequences[:, 0], initial_state, training=training)
            before, self.unroll = self.unroll, True
            try:
                return stock(self, sequences, initial_state, mask, training)
            finally:
                self.unroll = before

        kind.inner_loop = inner_loop

    for kind in (keras.layers.LSTM, keras.layers.GRU, keras.layers.RNN):
        unrolled(kind)


def _install_silu():
    """In the stock form it has a gradient of its own, which fails in a condition."""
    stock = tf.nn.silu

    def silu(features, beta=1.0):
        if not in_step():
            return stock(features, beta)
        features = tf.convert_to_tensor(features)
        return features * tf.sigmoid(tf.cast(beta, features.dtype) * features)

    tf.nn.silu = tf.nn.swish = silu


def _install_random():
    module = compatibility.keras_random

    def pinned(stock):
        def draw(*args, **kwargs):
            drawn = stock(*args, **kwargs)
            return _replicated(drawn) if in_step() else drawn

        return draw

    names = ("normal", "uniform", "truncated_normal", "randint", "gamma", "beta")
    for name in (*names, "binomial", "categorical"):
        setattr(module, name, pinned(getattr(module, name)))
    stock_dropout = module.dropout

    def dropout(inputs, rate, noise_shape=None, seed=None):
        if not in_step() or not 0.0 < rate < 1.0:
            return stock_dropout(inputs, rate, noise_shape, seed)
        shape = module._get_concrete_noise_shape(inputs, noise_shape)
        # As `tf.nn.experimental.stateless_dropout`.
        seed = module._cast_seed(keras.src.random.seed_generator.draw_seed(seed))
        drawn = _replicated(
            tf.random.stateless_uniform(shape, seed=seed, dtype=inputs.dtype)
        )
        kept = inputs * tf.constant(1.0 / (1.0 - rate), inputs.dtype)
        return tf.where(drawn >= rate, kept, tf.zeros_like(kept))

    module.dropout = dropout


def _replicated(value):
    return dtensor.relayout(
        value, dtensor.Layout.replicated(current_mesh(), value.shape.rank)
    )


# Elements of one-hot indices on a device up to which a product sums slices.
_MOST_ONE_HOT = 2**26


def _install_slices():
    def dense(value, dtype=None, name=None, as_ref=False):
        """Sums `tf.IndexedSlices` into a dense tensor, within a step.

        The stock way is right, but DTensor gathers all slices on every device.
        """
        del name, as_ref
        mesh = current_mesh()
        if mesh is None or value.dense_shape is None:
            return NotImplemented
        if dtype is not None and not dtype.is_compatible_with(value.dtype):
            return NotImplemented
        if hasattr(value.dense_shape, DENSE_BY):
            return getattr(value.dense_shape, DENSE_BY)(value)
        shape = tf.get_static_value(value.dense_shape)
        if shape is None:
            return NotImplemented
        num_rows = int(shape[0])
        indices = tf.reshape(value.indices, [-1])
        local = indices.shape[0] / mesh.size
        if num_rows * local > _MOST_ONE_HOT or value.values.shape.rank != 2:
            return NotImplemented
        own = tf.one_hot(indices, num_rows, dtype=value.dtype)
        return tf.matmul(own, value.values, transpose_a=True)

    tf.register_tensor_conversion_function(tf.IndexedSlices, dense, priority=50)
    module = compatibility.keras_numpy
    stock_divide = module.divide

    def divide(x1, x2):
        # Keras looks for zeros in the divisor, by operations of open shapes. The
        # quotient is linear in the slices, so their sum can be divided instead.
        if in_step() and isinstance(x1, tf.IndexedSlices) and len(x2.shape):
            x1 = tf.convert_to_tensor(x1)
        return stock_divide(x1, x2)

    module.divide = divide


def _install_clipping():
    kind = compatibility.BaseOptimizer
    stock = kind._backend_apply_gradients

    def _backend_apply_gradients(self, grads, trainable_variables):
        limits = self.clipnorm, self.global_clipnorm
        copies = [_num_copies(variable) for variable in trainable_variables]
        if not in_step() or not any(limits) or max(copies, default=1) == 1:
            return stock(self, grads, trainable_variables)
        # The norm of G equal copies is that of one, times the root of G.
        grads = [
            g if n == 1 else g / n**0.5 for g, n in zip(grads, copies, strict=True)
        ]
        grads = self._clip_gradients(grads)
        grads = [
            g if n == 1 else g * n**0.5 for g, n in zip(grads, copies, strict=True)
        ]
        self.clipnorm = self.global_clipnorm = None
        try:
            return stock(self, grads, trainable_variables)
        finally:
            self.clipnorm, self.global_clipnorm = limits

    kind._backend_apply_gradients = _backend_apply_gradients


def _num_copies(variable):
    return variable.num_copies if isinstance(variable, LaidOutExperts) else 1


def _install_build():
    stock = compatibility.BaseOptimizer.build

    def build(self, variables):
        slots.verify_untouched_rows(self, variables)
        stock(self, variables)

    compatibility.BaseOptimizer.build = build


def _install_adafactor():
    kind = keras.optimizers.Adafactor
    stock_build, stock_rms, stock_step = kind.build, kind._rms, kind.update_step
    # Those of the variable at hand; an attribute would be saved in checkpoints.
    slices = None

    def build(self, var_list):
        if self.built or not any(isinstance(v, LaidOutExperts) for v in var_list):
            return stock_build(self, var_list)
        _verify_factors(var_list)
        return slots.build_adafactor(self, var_list)

    def update_step(self, gradient, variable, learning_rate):
        nonlocal slices
        self._padded = padded_share(self, variable)
        slices = _slices_of(self, gradient, variable)
        try:
            stock_step(self, gradient, variable, learning_rate)
        finally:
            slices = None

    def _rms(self, x):
        if slices is not None and not isinstance(x, tf.Variable | keras.Variable):
            return _rms_of_slices(*slices)
        # The mean over real experts only: those of the padding are zero.
        return stock_rms(self, x) * getattr(self, "_padded", 1.0)

    kind.build, kind._rms, kind.update_step = build, _rms, update_step


def _slices_of(optimizer, gradient, variable):
    """A gradient of slices in a step, and the variable of its second moment."""
    if not (in_step() and isinstance(gradient, tf.IndexedSlices)):
        return None
    return gradient, optimizer._v[optimizer._get_variable_index(variable)]


def _rms_of_slices(gradient, velocity):
    """As Keras on one device: of the slices, not of their sums, over all rows."""
    scale = tf.gather(tf.convert_to_tensor(velocity), gradient.indices)
    square = tf.reduce_sum(tf.square(gradient.values) / scale)
    return tf.sqrt(square / tf.cast(tf.reduce_prod(velocity.shape), square.dtype))


def padded_share(optimizer: Any, variable: Any) -> float:
    """Root of all rows of a copy of a sharded weight over its real ones; else 1."""
    variable = optimizer._trainable_variables[optimizer._get_variable_index(variable)]
    if not isinstance(variable, LaidOutExperts):
        return 1.0
    rows = variable.value.shape[0] / variable.num_copies
    return (rows / variable.num_experts) ** 0.5


def _verify_factors(variables):
    """Means over the experts themselves are right without padding and copies only."""
    for variable in variables:
        if not isinstance(variable, LaidOutExperts) or len(variable.shape) >= 3:
            continue
        if getattr(variable, "is_table", False):
            raise ValueError(
                "`optimizer` Adafactor takes means over all words, which the devices of "
                f"a mesh share out here. Received: {variable.path!r}. Do not shard the "
                "vocabulary, or use another optimizer."
            )
        if variable.value.shape[0] != variable.num_experts:
            raise ValueError(
                "`optimizer` Adafactor takes means over the last two axes, of which "
                f"one is that of the experts here. Received: {variable.path!r} of shape "
                f"{tuple(variable.shape)} on {variable.mesh.size} devices in "
                f"{variable.num_copies} groups. Set `use_bias` of the experts to False, "
                "or take one group of devices and a number of experts that they divide."
            )
