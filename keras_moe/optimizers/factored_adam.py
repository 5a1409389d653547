"""Adam that keeps next to no state for the weights of experts."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks, engine, updating
from keras_moe.optimizers import adam, backward, factors, patterns, readers, rows
from keras_moe.types import at_least_float32

UNTOUCHED_ROWS = ("decay", "catch_up", "keep")


@keras.saving.register_keras_serializable(package="keras_moe")
class FactoredAdam(backward.UpdatesInBackward, keras.optimizers.Adam):
    """Adam; for expert weights with beta1 = 0 and a factored second moment.

    An expert weight of shape `(E, in, out)` keeps, instead of a first and a
    second moment of that size, the averages of its squared gradients over rows
    and over columns, `(E, in)` and `(E, out)`:

    $r \\leftarrow \\beta_2 r + (1 - \\beta_2) \\mathrm{mean}_{out}(g^2)$,
    $c \\leftarrow \\beta_2 c + (1 - \\beta_2) \\mathrm{mean}_{in}(g^2)$,
    $\\hat V = r c^T / \\mathrm{mean}(r) / (1 - \\beta_2^t)$,
    $w \\leftarrow w - \\eta g / (\\sqrt{\\hat V} + \\epsilon)$,

    for each expert by itself. The mean of r and that of c are both the mean of
    the second moment. If all squared gradients have rank 1 with the same factors,
    this is Adam with beta1 = 0 exactly. All other weights are updated as by
    `keras.optimizers.Adam`; on one device in one pass over weight, moments and
    gradient, so `FactoredAdam(factored=[])` is a faster Adam for all weights.

    An expert that takes no token has a zero gradient: its weights stay, and its
    averages decay.

    Args:
        learning_rate: Float or schedule. Defaults to `0.001`.
        beta_1: Float. Decay of the first moment of weights that are not
            factored. Defaults to `0.9`.
        beta_2: Float. Decay of the second moment, factored or not. Defaults to
            `0.999`.
        epsilon: Float above 0. Added to the root of the second moment. Squares of
            gradients below 1e-19 are 0 in float32, and the step is then their
            quotient with `epsilon`. Defaults to `1e-7`.
        untouched_rows: `"decay"`, `"catch_up"` or `"keep"`. What becomes of the rows
            of an embedding, of the kernel of a `SampledSoftmax`, or of the experts of
            `computation="chosen"`, that a step has not read. `"decay"`: as in Adam, their
            momentum moves them on and decays, for which a step reads and writes the
            whole table. Otherwise a step costs only the rows that it has read.
            `"catch_up"`: what Adam would have done meanwhile to a row and its state is
            done when it has been read again; one number a row more. `"keep"`: rows and
            their state stay (often called lazy Adam), and rare words learn less.
            Factored kernels have no momentum, so experts that were not read stay in
            any case; with `"keep"` their averages stay, too, otherwise those of all
            experts decay in every step, `in + out` numbers an expert. Defaults to
            `"decay"`.
        factored: None or a list of regular expressions. None factors the
            weights that are marked as those of experts, with an attribute
            `is_expert_weight` that is True, as `FeedForwardExperts` marks its
            kernels. A list factors every weight whose path is matched by one of
            them (`re.search`), e.g. `["experts/kernel"]`. The last two axes are
            factored, so the weight must have rank 2 or more. Defaults to
            `None`.
        learning_rate_factors: None or a dict of regular expression to a number of
            at least 0, by which the learning rate is multiplied for the weights
            whose path is matched (`re.search`), e.g. `{"_experts": 0.5}`; 0
            leaves them as they are. Of several that match one weight the product is
            taken. Weight decay goes by the rate without them. Defaults to `None`.
        update_in_backward: Bool. Whether factored kernels of up to 256 experts are
            updated where their gradients arise, a few experts at a time: the gradient of
            the stack, as large as the weights, is never there, and the weights are the
            same. In `fit` nothing else is needed; a loop of one's own, within one
            `tf.function`, computes gradients of `optimizer.scale_loss(loss)`, once.
            Where it cannot be done (eager mode, several devices, XLA and GPUs, a
            `LossScaleOptimizer`, experts in blocks, with `recompute`, rules or frozen
            ones, or used twice) the step is the ordinary one, with a warning. Defaults
            to `False`.
        name: Str. Defaults to `"factored_adam"`.
        **kwargs: Those of `keras.optimizers.Adam` but `amsgrad`: weight decay,
            clipping, EMA, loss scale, gradient accumulation.

    Losses and state:
        The slots `row` and `column` for a factored weight, `momentum` and
        `velocity` for another. Rows and columns keep the leading axes of the
        weight, so where the experts are sharded, their state is sharded alike.

    Raises:
        ValueError: A decay is not within [0, 1), `epsilon` is 0 to float32 or another
            number is negative or not finite, `factored` is not a list of regular
            expressions or `learning_rate_factors` no dict of them, `amsgrad` is set;
            `update_in_backward` comes with an option that needs whole gradients;
            when built: a pattern matches no weight, or one of `factored` a weight of
            rank below 2.

    Example:

    >>> optimizer = keras_moe.optimizers.FactoredAdam(0.01)
    >>> experts = keras_moe.layers.FeedForwardExperts(8, hidden_units=64)
    >>> experts.build((None, 32))
    >>> optimizer.build(experts.trainable_variables)
    >>> sum(v.shape.num_elements() for v in optimizer.slots_of(experts.kernels[0]))
    768
    >>> experts.kernels[0].shape
    (8, 32, 64)

    Reference:
        Shazeer et al. 2017, appendix D.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        *,
        untouched_rows: str = "decay",
        factored: Sequence[str] | None = None,
        learning_rate_factors: Mapping[str, float] | None = None,
        update_in_backward: bool = False,
        name: str = "factored_adam",
        **kwargs: Any,
    ):
        beta_1 = checks.verify_rate(beta_1, "beta_1")
        beta_2 = checks.verify_rate(beta_2, "beta_2")
        epsilon = checks.verify_number(epsilon, "epsilon")
        if epsilon < 1.2e-38:
            raise ValueError(
                "`epsilon` must be above 0, also in float32, whose least number is "
                f"1.2e-38. Received: epsilon={epsilon!r}. A weight without a gradient "
                "would become NaN; leave it out for 1e-7."
            )
        if isinstance(learning_rate, int | float | str | np.generic | np.ndarray):
            learning_rate = checks.verify_number(learning_rate, "learning_rate")
        for option in ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm"):
            if kwargs.get(option) is not None:
                kwargs[option] = checks.verify_number(kwargs[option], option)
        if kwargs.pop("amsgrad", False):
            raise ValueError(
                "`amsgrad` must be left out. Received: amsgrad=True. The largest "
                "second moment cannot be kept in factors."
            )
        if update_in_backward:
            backward.verify_options(kwargs)
        checks.verify_choice(untouched_rows, "untouched_rows", UNTOUCHED_ROWS)
        if untouched_rows == "catch_up" and beta_1 >= beta_2**0.5:
            raise ValueError(
                "`beta_1` must be below the root of `beta_2` for rows to catch up, or "
                f"their moves grow with time. Received: beta_1={beta_1}, "
                f"beta_2={beta_2}. Pass untouched_rows='decay', or another decay."
            )
        super().__init__(
            learning_rate, beta_1, beta_2, epsilon=epsilon, name=name, **kwargs
        )
        self.untouched_rows = untouched_rows
        self.factored = None if factored is None else patterns.verify_patterns(factored)
        self.learning_rate_factors = patterns.verify_factors(learning_rate_factors)
        self._set_update_in_backward(update_in_backward)
        self._readers = readers.NONE

    def build(self, var_list):
        """Makes the slots.

        Args:
            var_list: The variables to train.
        """
        if self.built:
            return
        # Past Adam, whose slots are as large as the weights.
        super(keras.optimizers.Adam, self).build(var_list)
        self._momentums, self._velocities = [], []
        self._rows, self._columns, self._last_steps = [], [], []
        selected = self._select(var_list)
        self._rate_factors = self._factors_of(var_list)
        for variable in var_list:
            row = column = momentum = velocity = last_step = None
            if variable.path in selected:
                row, column = self._factors_for(variable)
            else:
                momentum = self.add_variable_from_reference(variable, "momentum")
                velocity = self.add_variable_from_reference(variable, "velocity")
                last_step = self._add_last_step(variable)
            self._rows.append(row)
            self._columns.append(column)
            self._last_steps.append(last_step)
            self._momentums.append(momentum)
            self._velocities.append(velocity)

    def _add_factors(self, variable):
        leading, (rows_, columns) = variable.shape[:-2], variable.shape[-2:]
        return [
            self.add_factor(variable, (*leading, rows_), "row"),
            self.add_factor(variable, (*leading, columns), "column"),
        ]

    def _add_last_step(self, variable):
        """When each row was read, if that is to be known."""
        is_dense = getattr(variable, "is_expert_weight", False) and not getattr(
            variable, "has_sparse_gradient", False
        )
        if self.untouched_rows != "catch_up" or is_dense or not variable.shape:
            return None
        # Float, of which GPUs hold all in their memory: exact up to 2**24 steps.
        dtype = at_least_float32(variable.dtype).name
        return self.add_variable(variable.shape[:1], dtype=dtype, name="last_step")

    def _select(self, var_list):
        """Paths of the variables to factor."""
        if self.factored is None:
            return {v.path for v in var_list if self._is_factored(v)}
        found = set()
        for pattern in self.factored:
            for variable in patterns.matched(pattern, var_list, "factored"):
                if len(variable.shape) < 2:
                    raise ValueError(
                        "`factored` must match weights of rank 2 or more. Received: "
                        f"{pattern!r}, which matches {variable.path!r} of shape "
                        f"{tuple(variable.shape)}. Make it more specific."
                    )
                found.add(variable.path)
        return found

    def _is_factored(self, variable):
        if self.factored is None:
            is_of_experts = getattr(variable, "is_expert_weight", False)
            return is_of_experts and len(variable.shape) >= 2
        return any(re.search(pattern, variable.path) for pattern in self.factored)

    def rate_factor_of(self, variable) -> float:
        """What the learning rate of a variable is multiplied by."""
        factors_ = self.learning_rate_factors.items()
        return math.prod(
            f for pattern, f in factors_ if re.search(pattern, variable.path)
        )

    def _factors_of(self, var_list):
        """What the learning rate of each variable is multiplied by."""
        for pattern in self.learning_rate_factors:
            patterns.matched(pattern, var_list, "learning_rate_factors")
        return [self.rate_factor_of(v) for v in var_list]

    def add_factor(self, variable, shape, name):
        """Makes a slot of another shape than its variable's.

        Args:
            variable: The variable it belongs to.
            shape: Tuple. Shape of the slot; the leading axes are those of the
                variable.
            name: Str. `"row"` or `"column"`.

        Returns:
            A variable of zeros, placed where `variable` is.
        """
        weights = engine.of_weight(variable).weights
        return weights.add_slot(self, variable, shape, f"{variable.name}_{name}")

    def slots_of(self, variable) -> list:
        """The state of one variable, once built.

        Args:
            variable: A variable the optimizer was built with.

        Returns:
            `[row, column]` if it is factored, else `[momentum, velocity]`.
        """
        index = self._get_variable_index(variable)
        if self._rows[index] is None:
            return [self._momentums[index], self._velocities[index]]
        return [self._rows[index], self._columns[index]]

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._readers = readers.Readers(grads)
        try:
            super()._backend_update_step(grads, trainable_variables, learning_rate)
        finally:
            self._readers = readers.NONE

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable and its slots."""
        found = self._readers.of(variable)
        # In a group: each of hundreds of experts has some, each operation would wait.
        with tf.control_dependencies([tf.group(*found)] if found else []):
            self._update(gradient, variable, learning_rate)

    def _update(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        if self._rate_factors[index] != 1.0:
            learning_rate = learning_rate * self._rate_factors[index]
        if self._rows[index] is not None:
            self._update_factored(gradient, variable, learning_rate, index)
        elif rows.is_sparse(gradient) and self.untouched_rows != "decay":
            slots = self._momentums[index], self._velocities[index]
            last_step = self._last_steps[index]
            rows.apply(self, gradient, variable, slots, last_step, learning_rate)
        else:
            if rows.is_sparse(gradient):
                gradient = tf.convert_to_tensor(gradient)  # sums rows by word
            self._update_whole(gradient, variable, learning_rate, index)

    def _update_whole(self, gradient, variable, learning_rate, index):
        gradient = tf.cast(gradient, variable.dtype)
        if not adam.can_be_applied(variable, gradient):
            super().update_step(gradient, variable, learning_rate)
            return
        slots = self._momentums[index], self._velocities[index]
        step = self.iterations + 1
        adam.apply(variable, *slots, gradient, learning_rate, step, self)

    def _update_factored(self, gradient, variable, learning_rate, index):
        """Block by block of experts, so that no second array of the size of all
        their weights comes to be."""
        slots = self._rows[index], self._columns[index]
        is_of_some = rows.is_sparse(gradient) and len(variable.shape) > 2
        if is_of_some and updating.is_on_one_device():
            rows.apply_factored(self, gradient, variable, slots, learning_rate)
            return
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        # Summed over replicas it may have lost its shape.
        gradient = tf.ensure_shape(gradient, variable.shape)
        parts = factors.blocks_of(gradient.shape, gradient.dtype.size)
        if len(parts) == 1:
            step, *new = self.factored_step(gradient, learning_rate, slots)
            for slot, value in zip(slots, new, strict=True):
                self.assign(slot, value)
            self.assign_sub(variable, step)
            return
        target = variable.value if isinstance(variable, keras.Variable) else variable
        before: list = []
        found = []
        for part in parts:
            with tf.control_dependencies(before):  # one after the other
                own = tf.identity(gradient[part])
            step, *new = self.factored_step(own, learning_rate, slots, part)
            done = factors.subtract_from(target, part, step)
            before = [] if tf.executing_eagerly() else [done]
            found.append(new)
        factors.end_of_writes(target)
        for slot, values in zip(slots, zip(*found, strict=True), strict=True):
            self.assign(slot, tf.concat(values, axis=0))

    def factored_step(self, gradient, learning_rate, slots, part=slice(None)):
        """What to subtract from a part of a weight, its new rows and columns.

        Args:
            gradient: Of the part.
            learning_rate: A number.
            slots: Rows and columns of the weight.
            part: A run of experts. Defaults to all.
        """
        row, column = (tf.convert_to_tensor(slot)[part] for slot in slots)
        step = self.iterations + 1
        return factors.factored_step(
            gradient, row, column, step, learning_rate, self.beta_2, self.epsilon
        )

    def _clip_gradients(self, grads):
        if any(map(rows.is_sparse, grads)):  # Keras would make them dense
            if self.clipnorm:
                return [tf.clip_by_norm(g, self.clipnorm) for g in grads]
            if self.global_clipnorm:
                return tf.clip_by_global_norm(grads, self.global_clipnorm)[0]
        return super()._clip_gradients(grads)

    def get_config(self):
        config = super().get_config()
        del config["amsgrad"]
        return {
            **config,
            "untouched_rows": self.untouched_rows,
            "factored": None if self.factored is None else list(self.factored),
            "learning_rate_factors": dict(self.learning_rate_factors),
            "update_in_backward": self.update_in_backward,
        }
