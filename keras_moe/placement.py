"""Where experts live and how layers reach them: the seam to `distribution`.

Layers ask `for_weights()` when they make weights and `for_call()` when they run.
On one device both give `ONE_DEVICE`, which does nothing. Under a
`tf.distribute.Strategy` of several replicas they give the placement that
`keras_moe.distribution` has registered.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


class Placement:
    """All experts on one device. The base of every other placement."""

    num_replicas = 1
    replica = 0
    # Whether only operations of static shapes are at hand; then `mix` is used.
    static_shapes = False

    def add_expert_weight(
        self, layer: Any, shape: tuple, initializer: Any, name: str, together: int = 1
    ) -> Any:
        """Adds a weight stacked over experts to a layer.

        Args:
            layer: The Keras layer that owns it.
            shape: `(E, ...)`, of all experts.
            initializer: Keras initializer of the whole stack.
            name: Name of the weight.
            together: Experts that must live on one replica. Divides E.

        Returns:
            The Keras variable. In Python it reads and is set as all experts.
        """
        return layer.add_weight(name=name, shape=shape, initializer=initializer)

    def add_group_weight(
        self, layer: Any, shape: tuple, initializer: Any, name: str
    ) -> Any:
        """Adds a gate's weight stacked over groups, which lives where they do."""
        return self.add_expert_weight(layer, shape, initializer, name)

    def add_slot(self, optimizer: Any, variable: Any, shape: tuple, name: str) -> Any:
        """Adds optimizer state that has another shape than its weight.

        Args:
            optimizer: The Keras optimizer that owns it.
            variable: The weight it belongs to.
            shape: Shape of the state of the whole weight. Where experts are
                sharded, the first axis is that of the experts.
            name: Name of the state.

        Returns:
            A Keras variable of zeros, placed where the weight is.
        """
        strategy = tf.distribute.get_strategy()
        with strategy.extended.colocate_vars_with(variable.value):
            return optimizer.add_variable(shape, dtype=variable.dtype, name=name)

    def at_home(
        self,
        owner: Any,
        rows: tf.Tensor,
        counts: tf.Tensor,
        function: Callable[[tf.Tensor, tf.Tensor, Any], tf.Tensor],
    ) -> tf.Tensor:
        """Runs a function on rows where the weights for them live.

        Args:
            owner: The layer whose stacked weights the function needs.
            rows: `(M, D)` sorted by the first axis of these weights, of length S,
                or `(S, C, D)` on one device.
            counts: `(S,)` int32, rows for each entry of that axis.
            function: Takes the rows that arrive, their counts for the entries
                that live here, and the number of rows that come before them in
                the sorted rows of all replicas; returns a row for each row.

        Returns:
            What the function returns, in the order of `rows`.
        """
        return function(rows, counts, 0)

    def run_experts(
        self, experts: Any, expert_inputs: tf.Tensor, counts: tf.Tensor
    ) -> tf.Tensor:
        """Runs experts on rows, wherever they live.

        Args:
            experts: The layer of experts.
            expert_inputs: `(M, D)` sorted by expert, or `(E, C, D)`.
            counts: `(E,)` int32, rows of each expert.

        Returns:
            Outputs in the order of the inputs.
        """
        return self.at_home(
            experts,
            expert_inputs,
            counts,
            lambda rows, own_counts, _: experts(rows, counts=own_counts),
        )

    def own_entries(self, num_entries: int) -> range:
        """Which entries of a stacked weight live here, of so many in all."""
        return range(num_entries)

    def over_columns(
        self,
        values: tf.Tensor,
        function: Callable[[tf.Tensor], tf.Tensor],
        filling: float,
    ) -> tf.Tensor:
        """Masks of columns that run over the rows of every replica.

        Args:
            values: `(N, E)` float, the rows of this replica.
            function: Maps whole columns, `(rows of all replicas, any number)`,
                to bool of that shape. The rows of a replica keep their order and
                follow those of the replicas before; rows of `filling` may stand
                between them.
            filling: Value of such rows.

        Returns:
            `(N, E)` bool, the rows of this replica. No gradient.
        """
        return function(tf.stop_gradient(values))

    def mix(
        self, layer: Any, tokens: tf.Tensor, result: Any, mask: tf.Tensor | None
    ) -> tf.Tensor:
        """Dispatches tokens to experts, runs them and combines; static shapes only.

        Args:
            layer: The mixture, which has `experts` and `gating`.
            tokens: `(N, D)`.
            result: The `GatingResult`. Expert -1 in it is none.
            mask: `(N,)` bool or None. False gives a token no expert.

        Returns:
            `(N, output_units)`.
        """
        raise NotImplementedError

    def top_k(self, values: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
        """As `tf.math.top_k`."""
        return tf.math.top_k(values, k=k)

    def pick(self, values: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
        """Of each row of `(N, E)` the values at `(N, K)` indices."""
        return tf.gather(values, indices, batch_dims=1)

    def sum_by_expert(
        self, values: tf.Tensor, indices: tf.Tensor, num_experts: int
    ) -> tf.Tensor:
        """Sum of the values of each expert, `(E,)`; index -1 is left out."""
        # One small matrix product would need a dense (N, E) array; a segment sum
        # touches the K chosen gates only. Negative ids are dropped by the op.
        return tf.math.unsorted_segment_sum(
            tf.reshape(values, [-1]), tf.reshape(indices, [-1]), num_experts
        )

    def entries_here(self, variable: Any, values: Any) -> Any:
        """Those of an array that go with the part of a weight that is here.

        Args:
            variable: The weight `(E, ...)`, from `add_expert_weight`.
            values: `(E, ...)`, an array.

        Returns:
            A part of the array.
        """
        return values

    def replicated(self, value: tf.Tensor) -> tf.Tensor:
        """The same tensor, laid out whole on every device."""
        return value

    def noise_of(self, noise: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
        """Hands rows of noise, one a token, to the tokens that are real."""
        return noise

    def local_variable(self, value: Callable[[], Any], shape: tuple) -> Any:
        """A variable of this device alone, which no file and no other device sees.

        Args:
            value: Gives the initial value.
            shape: Static shape, with None where it may change.

        Returns:
            The `tf.Variable`, made outside of the function that is being traced.
        """
        with tf.init_scope():
            return tf.Variable(value(), shape=shape, trainable=False)

    def sum(self, value: tf.Tensor) -> tf.Tensor:
        """Sum over the replicas of a tensor of one shape, with its gradient."""
        return value

    def gather(self, value: tf.Tensor) -> tf.Tensor:
        """`(...)` of every replica -> `(R, ...)`. No gradient."""
        return value[tf.newaxis]

    def num_before(self, num_rows: tf.Tensor | int) -> tf.Tensor:
        """Rows on the replicas before this one, `()` int32.

        Args:
            num_rows: Rows on this replica.
        """
        return tf.constant(0)


ONE_DEVICE = Placement()

# Gives the placement of a strategy; set by `keras_moe.distribution`.
_engine: Callable[[Any], Placement] | None = None


def register(engine: Callable[[Any], Placement]) -> None:
    """Sets what turns a `tf.distribute.Strategy` into a `Placement`."""
    global _engine
    _engine = engine


def for_weights() -> Placement:
    """The placement for weights made here, in the scope of a strategy or not.

    Raises:
        ValueError: The strategy is of a kind that is not supported.
    """
    if _engine is None or not tf.distribute.has_strategy():
        return ONE_DEVICE
    return _engine(tf.distribute.get_strategy())


def of_weight(variable: Any) -> Placement:
    """The placement of a weight that `add_expert_weight` has made, in any scope."""
    strategy = getattr(variable, "strategy", None)
    return ONE_DEVICE if strategy is None or _engine is None else _engine(strategy)


def for_call() -> Placement:
    """The placement for a call that runs here.

    Outside of `strategy.run` a layer sees all experts and works on one device.

    Raises:
        ValueError: The strategy is of a kind that is not supported.
    """
    if tf.distribute.in_cross_replica_context():
        return ONE_DEVICE
    return for_weights()


def current_replica() -> int | None:
    """Number of the replica whose code runs here, None between replicas."""
    if not tf.distribute.has_strategy():
        return 0
    context = tf.distribute.get_replica_context()
    if context is None:
        return None
    return int(tf.get_static_value(context.replica_id_in_sync_group))


def verify_one_device(layer: Any) -> None:
    """For a layer that does not yet know how to run on several devices.

    Raises:
        ValueError: The scope is that of a strategy of several replicas.
    """
    place = for_weights()
    num_replicas = place.num_replicas
    if num_replicas > 1 or place.static_shapes:
        kind = type(layer).__name__
        raise ValueError(
            f"`{kind}` runs on one device only. Received: {layer.name!r} built for "
            f"{num_replicas} replicas. Use `MoE` or `HierarchicalMoE` with "
            f"`FeedForwardExperts` there, or build {kind} outside of the scope."
        )
