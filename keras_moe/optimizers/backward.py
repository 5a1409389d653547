"""Steps of experts within the backward pass, where their gradients arise."""

import warnings
from typing import Any

import tensorflow as tf

from keras_moe import updating
from keras_moe.optimizers import factors

# What needs whole gradients, gradients of several steps, or a look at the weights later.
_NEEDS_GRADIENTS = (
    "clipnorm",
    "global_clipnorm",
    "use_ema",
    "gradient_accumulation_steps",
    "loss_scale_factor",
)


def verify_options(options: dict[str, Any]) -> None:
    """Raises if a step in the backward pass cannot do what an option says."""
    for name in _NEEDS_GRADIENTS:
        if options.get(name):
            raise ValueError(
                f"`{name}` must be left out with update_in_backward=True, which never "
                f"has the whole gradient of a step. Received: {name}="
                f"{options[name]!r}. Leave one of them out; `clipvalue` and "
                "`weight_decay` go together with it."
            )


# A Keras optimizer stands behind it in the order of bases.
_Optimizer: Any = object


class UpdatesInBackward(_Optimizer):
    """What `FactoredAdam` adds to Keras' optimizers for its steps in the backward pass.

    Attributes:
        update_in_backward: Bool. Whether it does anything.
    """

    update_in_backward = False

    def _set_update_in_backward(self, value):
        self.update_in_backward = bool(value)
        self._made = _Slots()
        self._has_warned = False
        if self.update_in_backward:
            updating.want(self)

    def scale_loss(self, loss):
        """Takes note of the loss of a step, whose gradients are computed next.

        Args:
            loss: The loss, as for every Keras optimizer.

        Returns:
            The loss to compute gradients of.
        """
        if self.update_in_backward:
            updating.open_step(self)
        return super().scale_loss(loss)

    def begin_update(self, variable: Any) -> Any:
        """What takes the gradients of a kernel in the backward pass.

        Args:
            variable: A Keras variable.

        Returns:
            A `BackwardUpdate`, or None if the variable is not updated so.
        """
        known = not self.built or any(v is variable for v in self._trainable_variables)
        if not known or not self._is_factored(variable):
            return None
        return BackwardUpdate(self, variable, self._slots_to_update(variable))

    def _slots_to_update(self, variable):
        """Its rows and columns; in the first step they are made before all others."""
        if self.built:
            return self.slots_of(variable)
        if id(variable) not in self._made.found:
            slots = self._add_factors(variable)
            for slot in slots:  # it takes its place among the others in `build`
                self._untrack_variable(slot)
            self._made.found[id(variable)] = variable, slots
        return self._made.found[id(variable)][1]

    def _factors_for(self, variable):
        """Rows and columns for `build`: those made before, or new ones."""
        _, slots = self._made.found.pop(id(variable), (None, None))
        if slots is None:
            return self._add_factors(variable)
        for slot in slots:
            self._track_variable(slot)
        return slots

    def _filter_empty_gradients(self, grads, variables):
        if self.update_in_backward:
            grads, variables = self._without_updated(grads, variables)
            if not grads:
                return [], []
        return super()._filter_empty_gradients(grads, variables)

    def _without_updated(self, grads, variables):
        step = updating.close_step(self)
        updated = {} if step is None else {id(v): v for v in step.updated}
        given = {id(v) for v in variables}
        for variable in updated.values():
            if id(variable) not in given:
                raise ValueError(
                    "`variables` must have the weights that were updated in the "
                    f"backward pass. Received none for {variable.path!r}. Set its "
                    "`trainable` to False, or pass update_in_backward=False."
                )
        plain = []
        for gradient, variable in zip(grads, variables, strict=True):
            if id(variable) in updated and gradient is not None:
                raise ValueError(
                    "A weight that is updated in the backward pass must be used once in "
                    f"a step. Received a further gradient for {variable.path!r}: "
                    "something beside its layer reads it. Pass "
                    "update_in_backward=False."
                )
            if id(variable) not in updated and self._is_factored(variable):
                plain.append(variable.path)
        if plain and not self._has_warned:
            self._has_warned = True
            warnings.warn(_reason(step, plain), stacklevel=2)
        rest = [
            (gradient, variable)
            for gradient, variable in zip(grads, variables, strict=True)
            if id(variable) not in updated
        ]
        return [list(each) for each in zip(*rest, strict=True)] if rest else ([], [])


def _reason(step, paths):
    if step is None:
        why = (
            "no step was announced in a `tf.function` on one device: there "
            "`optimizer.scale_loss(loss)` is called before the gradients are computed, as "
            "`fit` does (a `LossScaleOptimizer` around it does not, nor does eager mode)"
        )
    else:
        why = (
            "their experts do not run unrolled by themselves: more than 256, or used "
            "twice, in a loop, with `recompute`, rules or frozen experts"
        )
    return (
        "`update_in_backward` had no effect, weights are the same, on "
        f"{paths}: {why}. See the guide on performance."
    )


class _Slots:
    """Slots that are there before `build`. TensorFlow does not track them by this."""

    def __init__(self):
        self.found = {}


class BackwardUpdate:
    """Updates a stack of kernels, a few experts at a time, in one backward pass.

    Args:
        optimizer: The `FactoredAdam`.
        variable: The Keras variable `(E, in, out)`.
        slots: Its rows and columns.
    """

    def __init__(self, optimizer: Any, variable: Any, slots: list):
        self._optimizer, self._variable, self._slots = optimizer, variable, slots
        self._target = variable._value
        self._parts = factors.blocks_of(self._target.shape, self._target.dtype.size)
        self._part_of = {
            i: part for part in self._parts for i in range(part.start, part.stop)
        }
        self._gradients: dict[int, tf.Tensor] = {}
        self._reads: dict[int, tf.Tensor] = {}
        self._new_slots: dict[int, list[tf.Tensor]] = {}
        self._before: list[tf.Operation] = []

    def read(self, expert: int, dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The kernel of an expert before its update.

        Args:
            expert: Its number.
            dy: The gradient of the product with it.

        Returns:
            `(1, in, out)`, and `dy`, both after the update of the experts before: so
            few gradients are there at a time.

        Raises:
            ValueError: Gradients are computed twice in a step.
        """
        if expert in self._reads:
            raise ValueError(
                "Gradients must be computed once in a step with `update_in_backward`. "
                f"Received a second backward pass through {self._variable.path!r}. Pass "
                "update_in_backward=False."
            )
        # After the forward pass, whose tensor is the variable's memory: a gather beside
        # it would copy all kernels.
        with tf.control_dependencies([*self._before, dy]):
            kernel = tf.raw_ops.ResourceGather(
                resource=self._target.handle,
                indices=tf.constant([expert]),
                dtype=self._target.dtype,
            )
            dy = tf.identity(dy)
        self._reads[expert] = kernel
        return kernel, dy

    def add(self, expert: int, gradient: tf.Tensor) -> None:
        """Takes the gradient of an expert's kernel, `(1, in, out)`."""
        self._gradients[expert] = gradient
        part = self._part_of[expert]
        experts = range(part.start, part.stop)
        if all(i in self._gradients for i in experts):
            gradients = [self._gradients.pop(i) for i in experts]
            with tf.control_dependencies([self._reads[i] for i in experts]):
                self._update(part, tf.concat(gradients, axis=0))

    def _update(self, part, gradient):
        optimizer, dtype = self._optimizer, self._target.dtype
        gradient = tf.cast(gradient, dtype)
        limit = optimizer.clipvalue
        if limit:
            gradient = tf.clip_by_value(gradient, -limit, limit)
        rate = optimizer.learning_rate
        factor = optimizer.rate_factor_of(self._variable)
        step, *new = optimizer.factored_step(gradient, rate * factor, self._slots, part)
        if optimizer.weight_decay and optimizer._use_weight_decay(self._variable):
            kernels = tf.gather(self._target, tf.range(part.start, part.stop))
            step += kernels * tf.cast(optimizer.weight_decay * rate, dtype)
        self._before = [factors.subtract_from(self._target, part, step)]
        self._new_slots[part.start] = new
        if len(self._new_slots) == len(self._parts):
            self._finish()

    def _finish(self):
        factors.end_of_writes(self._target)
        found = [self._new_slots[part.start] for part in self._parts]
        for slot, values in zip(self._slots, zip(*found, strict=True), strict=True):
            self._optimizer.assign(slot, tf.concat(values, axis=0))
