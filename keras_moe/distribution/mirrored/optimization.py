"""Keras optimizers on models with sharded experts.

Keras sums gradients over the replicas after it has clipped them, and makes slots
of the shape of the whole weight. Here, within a replica of a model with sharded
experts, an optimizer

* sums the gradients of weights that every replica has; those of an expert are
  complete where it lives, since all its rows came there, or are summed over the
  replicas that hold it, one of each expert-parallel group;
* clips what results, the gradient of the global batch: dense weights count once,
  every expert once;
* accumulates, decays, updates and averages the part that lives on the replica, as
  if it were all there is. No replica waits for another in this, so it may stand
  inside a condition.

Optimizers that mix all elements of a weight (Lamb, Muon) are refused; Adafactor
does so by a mean of squares only, which is summed over the replicas.
"""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import engine
from keras_moe.distribution import compatibility, slots
from keras_moe.distribution.mirrored.expert_variable import HOLDERS, ExpertVariable
from keras_moe.types import at_least_float32

# Optimizers whose step for an element depends on all others of its weight.
_REFUSED = ("Lamb", "Muon", "ScheduleFreeAdamW", "MultiOptimizer")

_ALL = "all"  # replicas; see `_among`

_TFOptimizer = compatibility.TFOptimizer
_BaseOptimizer = compatibility.BaseOptimizer


def _has_experts(optimizer) -> bool:
    return any(is_of_experts(v) for v in optimizer._trainable_variables)


def is_of_experts(variable: Any) -> bool:
    """Whether a weight is one of experts, sharded or alike on all replicas."""
    return isinstance(variable, ExpertVariable) or hasattr(variable, "of_experts")


def _is_ours(optimizer) -> bool:
    """Whether this is a replica's step of a model with sharded experts."""
    return engine.current() is not engine.ONE_DEVICE and _has_experts(optimizer)


def part_here(variable: Any) -> Any:
    """The `tf.Variable` that holds a Keras variable on the present replica."""
    if isinstance(variable, ExpertVariable):
        return variable.part_of_replica()
    value = variable.value if isinstance(variable, keras.Variable) else variable
    strategy = engine.current().strategy  # type: ignore[attr-defined]
    return strategy.experimental_local_results(value)[
        compatibility.local_replica(strategy)
    ]


def apply_gradients(optimizer: Any, gradients: list, variables: list) -> None:
    """One step of an optimizer within a replica.

    Args:
        optimizer: A Keras optimizer, built.
        gradients: Of the loss of this replica, none of them None.
        variables: The Keras variables they belong to.
    """
    gradients = sum_gradients(gradients, variables)
    if optimizer.gradient_accumulation_steps:
        _apply_accumulated(optimizer, gradients, variables)
    else:
        gradients = clip_gradients(optimizer, gradients, variables)
        _update(optimizer, gradients, variables)
    if optimizer.use_ema:
        _average(optimizer)


def sum_gradients(gradients: list, variables: list) -> list:
    """Sums over the replicas what several of them have a part of.

    Args:
        gradients: Tensors or `tf.IndexedSlices`.
        variables: The Keras variables they belong to.

    Returns:
        The gradients of the global batch, in the same order; for a sharded
        variable that of its own part.
    """
    strategy = engine.current().strategy  # type: ignore[attr-defined]
    # Of a table the rows that were read stay such: on one device norms and squares
    # are of them one by one.
    sums = [
        tf.convert_to_tensor(g)
        if isinstance(v, ExpertVariable) and not v.is_table
        else g
        for g, v in zip(gradients, variables, strict=True)
    ]
    among = [_among(v) for v in variables]
    for kind in (_ALL, HOLDERS):
        places = [i for i, of in enumerate(among) if of == kind]
        parts = [sums[i] for i in places]
        if not parts:
            continue
        if kind == _ALL:
            found = compatibility.all_reduce_gradients(strategy, parts)
        else:
            found = compatibility.all_reduce_among(strategy, parts, kind)
        for i, total in zip(places, found, strict=True):
            sums[i] = total
    return sums


def _among(variable):
    """Which replicas have parts of the gradient of a weight; None for one alone."""
    if not isinstance(variable, ExpertVariable):
        return _ALL
    shards = variable.shards
    if shards.num_groups == 1 or 0 in variable.part_of_replica().shape:
        return None
    return _ALL if shards.group_size == 1 else HOLDERS


def clip_gradients(optimizer: Any, gradients: list, variables: list) -> list:
    """Clips as the optimizer says, by the norms of the whole gradients.

    Args:
        optimizer: Has `clipnorm`, `global_clipnorm` and `clipvalue`.
        gradients: Of the global batch.
        variables: The Keras variables they belong to.

    Returns:
        The clipped gradients.
    """
    if not (optimizer.clipnorm or optimizer.global_clipnorm):
        return optimizer._clip_gradients(gradients)
    squares = _squared_norms(gradients, variables)
    if optimizer.clipnorm:
        limit = optimizer.clipnorm
        norms = [tf.sqrt(square) for square in squares]
        return [
            g * tf.cast(limit / tf.maximum(norm, limit), g.dtype)
            for g, norm in zip(gradients, norms, strict=True)
        ]
    limit = optimizer.global_clipnorm
    norm = tf.sqrt(tf.add_n(squares))
    scale = limit * tf.minimum(1.0 / norm, 1.0 / limit)
    scale += norm - norm  # not a number if the norm is infinite, as in Keras
    return [g * tf.cast(scale, g.dtype) for g in gradients]


def _squared_norms(gradients, variables):
    """Sum of squares of each whole gradient: `()` float, alike on all replicas."""
    # As in Keras, rows of `tf.IndexedSlices` count one by one.
    dtype = at_least_float32(*(g.dtype for g in gradients))
    squares = [tf.cast(tf.reduce_sum(tf.square(_values(g))), dtype) for g in gradients]
    own = [
        i
        for i, v in enumerate(variables)
        if isinstance(v, ExpertVariable) and v.shards.group_size > 1
    ]
    if own:
        # Over all replicas, so that all find the same to the last bit. An expert
        # counts once, however many replicas hold it.
        shares = [squares[i] / variables[i].shards.num_groups for i in own]
        summed = engine.current().replicas.sum(tf.stack(shares))
        for i, square in zip(own, tf.unstack(summed, num=len(own)), strict=True):
            squares[i] = square
    return squares


def _values(gradient):
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def _update(optimizer, gradients, variables):
    if optimizer.weight_decay is not None:
        for variable in variables:
            part = part_here(variable)
            if optimizer._use_weight_decay(part):
                rate = tf.cast(optimizer.learning_rate, part.dtype)
                decay = tf.cast(optimizer.weight_decay, part.dtype)
                part.assign_sub(part * decay * rate)
    optimizer._backend_update_step(gradients, variables, optimizer.learning_rate)


def _apply_accumulated(optimizer, gradients, variables):
    steps = optimizer.gradient_accumulation_steps
    accumulators = [
        part_here(optimizer._accumulated_gradients[optimizer._get_variable_index(v)])
        for v in variables
    ]
    sums = [
        tf.convert_to_tensor(g) + total
        for g, total in zip(gradients, accumulators, strict=True)
    ]
    # The norms are exchanged in every step: no collective within the condition.
    means = clip_gradients(optimizer, [g / steps for g in sums], variables)

    def update():
        _update(optimizer, means, variables)
        for total in accumulators:
            total.assign(tf.zeros_like(total))

    def accumulate():
        for total, value in zip(accumulators, sums, strict=True):
            total.assign(value)

    last = (tf.convert_to_tensor(optimizer._iterations) + 1) % steps == 0
    keras.ops.cond(last, update, accumulate)


def _average(optimizer):
    variables = optimizer._trainable_variables
    optimizer._update_model_variables_moving_average(variables)
    if not optimizer.ema_overwrite_frequency:
        return
    averages = optimizer._model_variables_moving_average

    def overwrite():
        for variable, average in zip(variables, averages, strict=True):
            if average is not None:
                part_here(variable).assign(part_here(average))

    count = tf.convert_to_tensor(optimizer.iterations) + 1
    keras.ops.cond(
        count % optimizer.ema_overwrite_frequency == 0, overwrite, lambda: None
    )


_installed = False


def install() -> None:
    """Teaches Keras' optimizers about sharded weights. The second call does nothing.

    Optimizers of other models, and all of them on one device, work as before.
    """
    global _installed
    if not _installed:
        slots.install()
        _install_build()
        _install_steps()
        _install_loss_scale()
        _install_adafactor()
    _installed = True


def _install_build():
    stock_build = _BaseOptimizer.build

    def build(self, variables):
        kind = type(self).__name__
        sharded = [v.path for v in variables if isinstance(v, ExpertVariable)]
        if sharded and kind in _REFUSED:
            raise ValueError(
                f"`optimizer` {kind} computes with a whole weight at once and does "
                "not work with sharded experts or words. Received: "
                f"{len(sharded)} sharded weights, the first {sharded[0]!r}. Use "
                "Adam, AdamW, SGD or another optimizer that works element by element."
            )
        slots.verify_untouched_rows(self, variables)
        stock_build(self, variables)

    _BaseOptimizer.build = build


def _install_steps():
    stock_apply = _BaseOptimizer._backend_apply_gradients
    stock_update = _TFOptimizer._backend_update_step

    def _backend_apply_gradients(self, grads, trainable_variables):
        if not _is_ours(self):
            return stock_apply(self, grads, trainable_variables)
        return apply_gradients(self, grads, trainable_variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if not _is_ours(self):
            return stock_update(self, grads, trainable_variables, learning_rate)
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            part = part_here(variable)
            with tf.device(part.device):
                self.update_step(gradient, part, learning_rate)
        return None

    _BaseOptimizer._backend_apply_gradients = _backend_apply_gradients
    _TFOptimizer._backend_update_step = _backend_update_step


def _install_loss_scale():
    kind = keras.optimizers.LossScaleOptimizer
    stock_check = kind.check_finite

    def check_finite(self, grads):
        """All replicas have to agree: gradients are not summed yet."""
        finite = stock_check(self, grads)
        if not _is_ours(self.inner_optimizer):
            return finite
        bad = tf.cast(tf.logical_not(finite), tf.float32)
        return tf.equal(engine.current().replicas.sum(bad), 0.0)

    kind.check_finite = check_finite


def _install_adafactor():
    kind = keras.optimizers.Adafactor
    stock_build, stock_rms = kind.build, kind._rms
    stock_step = kind.update_step

    def build(self, var_list):
        if self.built or not any(isinstance(v, ExpertVariable) for v in var_list):
            return stock_build(self, var_list)
        return _build_adafactor(self, var_list)

    def update_step(self, gradient, variable, learning_rate):
        self._part_of_experts = _is_part_of_experts(self, variable)
        stock_step(self, gradient, variable, learning_rate)

    def _rms(self, x):
        if not (_is_ours(self) and self._part_of_experts):
            return stock_rms(self, x)
        x = tf.convert_to_tensor(x)
        square = tf.reduce_sum(tf.square(x))
        sums = tf.stack([square, tf.cast(tf.size(x), square.dtype)])
        square, size = tf.unstack(engine.current().replicas.sum(sums))
        return tf.sqrt(square / size)

    kind.build, kind._rms, kind.update_step = build, _rms, update_step


def _is_part_of_experts(optimizer, variable):
    index = optimizer._get_variable_index(variable)
    return isinstance(optimizer._trainable_variables[index], ExpertVariable)


def _build_adafactor(optimizer, variables):
    for variable in variables:
        if isinstance(variable, ExpertVariable) and len(variable.shape) < 3:
            raise ValueError(
                "`optimizer` Adafactor takes means over the last two axes, of which "
                "one is that of the sharded experts or words here. Received: "
                f"{variable.path!r} of shape {tuple(variable.shape)}. Set `use_bias` "
                "of the experts to False, do not shard the vocabulary, or use another "
                "optimizer."
            )
    slots.build_adafactor(optimizer, variables)
