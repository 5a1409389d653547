"""What all stacked experts share: weights, the ways to run, rules, freezing.

What one expert computes stands in `network`; how rows come to it, on one device or
several, does not.
"""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks, engine, functional, updating
from keras_moe.layers.expert_rules import (
    PerExpertConstraint,
    PerExpertRegularizer,
    StepValues,
    stop_gradients,
    value_is_own,
    verify_frozen,
    with_dense_gradient,
)
from keras_moe.layers.initializers import PerExpertInitializer
from keras_moe.layers.tracking import track_entries


class Experts(checks.FromConfig, keras.layers.Layer):
    """Experts of one form, their weights stacked. The base of `FeedForwardExperts`.

    A subclass makes its weights in `build` with `add_expert_weight` and overrides
    `network`, which says what experts compute from rows and weights. It then runs
    wherever `FeedForwardExperts` do: fused with dispatch and combine, recomputed,
    with a capacity, sharded over several devices.

    Args:
        num_experts: Int. Number of experts.
        output_units: Int or None. Features of the output; None means those of
            the input. Defaults to `None`.
        recompute: Bool. Whether what lies between inputs and outputs is computed
            again in the backward pass instead of being kept (appendix D): same
            gradients, less memory, more operations. Defaults to `False`.
        computation: `"unrolled"`, each expert by itself; `"blocks"`, one batched
            product over padded rows; `"chosen"`, one of only those experts that have
            rows, see below; or None, which takes one of the first two by the number of
            experts and the device (`functional.default_computation`). Defaults to
            `None`.
        frozen_experts: Indices of experts that are not trained, see below. May be
            set later, before the model is compiled. Defaults to `()`.

    Call arguments:
        inputs: Float tensor, `(rows, features)` sorted by expert, or
            `(num_experts, capacity, features)`; with a plan `(tokens, features)`.
        counts: int32 tensor `(num_experts,)`: rows of each expert. Needed for
            inputs of rank 2 without a plan.
        gates: Float tensor, the gates that go with the plan.
        plan: A `keras_moe.types.DispatchPlan`, by which the tokens go to their
            experts and the answers are summed, `(tokens, output_units)`.

    Input shape:
        `(rows, features)` or `(num_experts, capacity, features)`.

    Output shape:
        The same with `output_units` in place of `features`.

    Losses and state:
        The weights that `build` adds, each `(num_experts, ...)`; losses of their
        regularizers.

    Frozen experts: they answer as before, and gradients pass through them to their
    inputs and to the gate. The gradient of their weights is zero, and they are
    neither regularized nor constrained. A step in which the layer runs and a Keras
    optimizer is applied, in one function or both outside of any (`fit`,
    `train_on_batch`, an own loop), leaves their weights bit for bit, whatever weight
    decay or momentum from before says. The exception is `use_ema`, whose averages
    overwrite them as they do all weights. The state of the optimizer is kept for
    them too and decays. An optimizer that Keras did not make, or that is applied in
    another function, sees zero gradients and nothing else. To save the state as well
    use `ExpertList`, whose experts are layers with `trainable` of their own.

    Only chosen experts: with `computation="chosen"` a step reads the weights of those
    experts that have rows, and nothing else, and their gradients are `tf.IndexedSlices` of
    these experts: the time and the memory of a step go by the experts chosen, not by
    E. It pays where a step chooses few of thousands of experts; else copying their weights
    costs more. An optimizer that makes dense gradients of them is right, too, but costs
    as much as ever; `FactoredAdam` and `keras.optimizers.SGD` without momentum do not.
    Regularizers, frozen experts and several devices get the same gradients, dense; XLA,
    GPUs and plans of a capacity compute as without it.

    Raises:
        ValueError: A size is not positive; `computation` is unknown;
            `frozen_experts` are no different experts; `counts` is
            missing; `gates` come without `plan` or the reverse; inputs have no
            known feature dimension, or a first dimension other than `num_experts`
            for rank 3.

    Example:

    >>> class Scales(keras_moe.layers.Experts):
    ...     def build(self, input_shape):
    ...         self.add_expert_weight("scale", (input_shape[-1],), "ones")
    ...     def network(self, rows, scale):  # (e, rows, features), (e, features)
    ...         return rows * scale[..., None, :]
    >>> moe = keras_moe.layers.MoE(Scales(8), keras_moe.layers.NoisyTopKGating(2))
    >>> moe(np.ones((3, 4), "float32")).shape.as_list()
    [3, 4]

    Reference:
        Shazeer et al. 2017, section 2.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        output_units: int | None = None,
        recompute: bool = False,
        computation: str | None = None,
        frozen_experts: Sequence[int] = (),
        **kwargs: Any,
    ):
        num_experts = checks.verify_positive_int(num_experts, "num_experts")
        if output_units is not None:
            output_units = checks.verify_positive_int(output_units, "output_units")
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.output_units = output_units
        self.recompute = bool(recompute)
        self.computation = functional.verify_computation(computation)
        # Experts that stay together where experts are sharded over devices.
        self.group_size = 1
        self.stacked_weights: list[Any] = []
        self._rules: list[tuple[Any, Any]] = []  # of each of them
        self._before = StepValues()
        self.frozen_experts = frozen_experts

    @property
    def frozen_experts(self) -> tuple[int, ...]:
        """Indices of experts that are not trained."""
        return self._frozen_experts

    @frozen_experts.setter
    def frozen_experts(self, value):
        self._frozen_experts = verify_frozen(value, self.num_experts)
        self._set_rules()

    @property
    def _frozen(self):
        return np.isin(np.arange(self.num_experts), self.frozen_experts)

    def _set_rules(self):
        """Tells Keras what to add to the losses, and what to do after an update."""
        frozen = self._frozen
        for weight, rules in zip(self.stacked_weights, self._rules, strict=True):
            regularizer, constraint = rules
            if regularizer is not None:
                weight.regularizer = PerExpertRegularizer(regularizer, frozen)
            weight.constraint = None
            if constraint is not None or frozen.any():
                before = functools.partial(self._before.of, weight.path)
                weight.constraint = PerExpertConstraint(constraint, frozen, before)

    def add_expert_weight(
        self,
        name: str,
        shape: Sequence[int],
        initializer: Any = "glorot_uniform",
        *,
        regularizer: Any = None,
        constraint: Any = None,
        **options: Any,
    ) -> Any:
        """Adds a weight to every expert; to be called in `build`.

        Args:
            name: Name of the weight.
            shape: Shape of one expert's weight. From rank 2 it is a kernel: every
                expert gets its own draw, with the fans of a single expert.
            initializer: Initial value. Defaults to `"glorot_uniform"`.
            regularizer: Of one expert's weight. Defaults to `None`.
            constraint: Of one expert's weight. Defaults to `None`.
            **options: `dtype` and `trainable`, as for `keras.Variable`.

        Returns:
            The Keras variable `(num_experts, *shape)`. `network` gets all of them
            in the order in which they were added.
        """
        strategy = self.stacked_weights and engine.strategy_of(self.stacked_weights[0])
        if strategy and not tf.distribute.has_strategy():  # after `build`, anywhere
            with strategy.scope():
                return self.add_expert_weight(
                    name,
                    shape,
                    initializer,
                    regularizer=regularizer,
                    constraint=constraint,
                    **options,
                )
        initializer = keras.initializers.get(initializer)
        is_kernel = len(shape) >= 2
        variable = engine.for_weights().weights.add_expert_weight(
            self,
            (self.num_experts, *shape),
            PerExpertInitializer(initializer) if is_kernel else initializer,
            name,
            self.group_size,
            **options,
        )
        # Optimizers may keep less state for kernels, see `FactoredAdam`, and more for what
        # they update expert by expert.
        variable.is_expert_weight = is_kernel
        variable.has_sparse_gradient = self.computation == "chosen"
        self.stacked_weights.append(variable)
        track_entries(self, "stacked_weights")
        self._rules.append(
            (keras.regularizers.get(regularizer), keras.constraints.get(constraint))
        )
        self._set_rules()
        return variable

    def read(self, weight: Any) -> tf.Tensor:
        """A weight for a call: without gradient where experts are frozen.

        Args:
            weight: One of the layer's stacked variables.

        Returns:
            `(E, ...)` of the experts that are here, in the compute type.
        """
        value = tf.convert_to_tensor(weight)
        if not self._is_frozen(weight):
            return value
        frozen = engine.current().weights.entries_here(weight, self._frozen)
        # Not what a policy makes of it.
        self._before.note(weight.path, tf.convert_to_tensor(weight._value))
        return stop_gradients(value, frozen)

    def _is_frozen(self, weight):
        return len(self.frozen_experts) > 0 and weight.trainable

    def values(self, rows: tf.Tensor) -> list[tf.Tensor]:
        """What `compute` takes beside rows: `stacked_weights`, and what else there is.

        Args:
            rows: The inputs of a call.
        """
        return [self.read(weight) for weight in self.stacked_weights]

    def for_update(self, values: list[Any]) -> list[Any]:
        """`values`, kernels as optimizers may update them in the backward pass."""
        return values

    def _for_chosen(self, values):
        """`values` as `"chosen"` takes them: variables, of which it reads few experts."""
        is_here = updating.is_on_one_device()
        own = [
            weight._value
            if is_here and value_is_own(weight) and not self._is_frozen(weight)
            else value
            for value, weight in zip(values, self.stacked_weights, strict=False)
        ]
        rest = values[len(own) :]
        return [*(own if is_here else map(with_dense_gradient, own)), *rest]

    def network(self, rows: tf.Tensor, *weights: tf.Tensor) -> tf.Tensor:
        """What experts compute, row by row.

        Args:
            rows: `(e, R, features)`: R rows for each of e experts, some or all.
            *weights: The part of every weight that belongs to them, `(e, ...)`.

        Returns:
            `(e, R, output_units)`.
        """
        raise NotImplementedError

    def compute(self, rows: tf.Tensor, *weights: tf.Tensor) -> tf.Tensor:
        """`network` of rows and `values`, as dispatchers call it."""
        return self.network(rows, *weights)

    def _network(self):
        """`compute`, as functions take networks."""
        return self.compute

    def verify_inputs(self, input_shape: Sequence[int | None]) -> int:
        """Returns the features of inputs, or raises if experts cannot take them."""
        name = type(self).__name__
        features = checks.verify_input_shape(input_shape, name)
        rank = len(input_shape)
        if rank > 3 or (rank == 3 and input_shape[0] not in (self.num_experts, None)):
            raise ValueError(
                f"`inputs` of {name} must be (rows, features) sorted by expert, or "
                f"(num_experts, capacity, features). Received: "
                f"shape={tuple(input_shape)}, num_experts={self.num_experts}. "
                "Wrap the experts in `MoE`, which sorts the tokens."
            )
        return features

    def call(self, inputs, counts=None, gates=None, plan=None):
        if (plan is None) != (gates is None):
            missing, given = ("gates", "plan") if gates is None else ("plan", "gates")
            raise ValueError(
                f"`{missing}` of {type(self).__name__} must come with `{given}`. "
                f"Received: {missing}=None. Pass both, or neither."
            )
        weights = self.values(inputs)
        if self.computation == "chosen":
            weights = self._for_chosen(weights)
        elif plan is not None:
            weights = self.for_update(weights)
        if plan is None:
            return functional.run_experts(
                self._network(),
                inputs,
                weights,
                counts,
                recompute=self.recompute,
                computation=self.computation,
            )
        return functional.mix_experts(
            self._network(),
            inputs,
            gates,
            plan,
            weights,
            recompute=self.recompute,
            computation=self.computation,
        )

    def get_build_config(self):
        # A file builds experts before the layer around them, which sets this.
        config = super().get_build_config() or {}  # None before it is built
        return {**config, "group_size": self.group_size} if config else None

    def build_from_config(self, config):
        self.group_size = (config or {}).get("group_size", 1)
        super().build_from_config(config)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.output_units or input_shape[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "output_units": self.output_units,
            "recompute": self.recompute,
            "computation": self.computation,
            "frozen_experts": list(self.frozen_experts),
        }
