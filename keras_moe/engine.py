"""Where the code runs: what one device, replicas and a mesh do differently.

An `Engine` answers four questions, each in an object or function of its own (and may
do a whole hierarchical mixture its own way):

* `weights`: where do weights of experts live, and the state that belongs to them?
* `replicas`: what do the replicas that run the same code tell each other?
* `operations`: how is an operation done whose stock form the engine cannot take?
* `dispatcher`: how do tokens meet experts that live elsewhere?

Layers ask `for_weights()` when they make weights and `current()` when they run. On
one device both give `ONE_DEVICE`, or `current()` a `StaticEngine` where XLA compiles or
the device is a GPU. Under a `tf.distribute.Strategy` they give the
engine that `keras_moe.distribution` makes for it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from keras_moe import operations, runtime


class Weights:
    """Makes weights on one device."""

    def add_expert_weight(
        self,
        layer: Any,
        shape: tuple,
        initializer: Any,
        name: str,
        together: int = 1,
        **options: Any,
    ) -> Any:
        """Adds a weight stacked over experts to a layer.

        Args:
            layer: The Keras layer that owns it.
            shape: `(E, ...)`, of all experts.
            initializer: Keras initializer of the whole stack.
            name: Name of the weight.
            together: Experts that must live on one replica. Divides E.
            **options: `dtype` and `trainable`, as for `keras.Variable`.

        Returns:
            The Keras variable. In Python it reads and is set as all experts.
        """
        return layer.add_weight(
            name=name, shape=shape, initializer=initializer, **options
        )

    def add_group_weight(
        self, layer: Any, shape: tuple, initializer: Any, name: str
    ) -> Any:
        """Adds a gate's weight stacked over groups, which lives where they do."""
        return self.add_expert_weight(layer, shape, initializer, name)

    def add_table_weight(
        self,
        layer: Any,
        shape: tuple,
        initializer: Any,
        name: str,
        axis: int = 0,
        **options: Any,
    ) -> Any:
        """Adds a weight with an entry for each word of a vocabulary to a layer.

        Args:
            layer: The Keras layer that owns it.
            shape: Of the whole table.
            initializer: Keras initializer of the whole table.
            name: Name of the weight.
            axis: That of the words. Defaults to 0.
            **options: Those of `add_weight`.

        Returns:
            The Keras variable. In Python it reads and is set as the whole table.
        """
        return layer.add_weight(
            name=name, shape=shape, initializer=initializer, **options
        )

    def sum_of_parts(self, variable: Any, value: tf.Tensor) -> tf.Tensor:
        """Sum over all experts of what was found of those that are here.

        Args:
            variable: The weight `(E, ...)`, from `add_expert_weight`.
            value: Found of the part of the weight that is here.

        Returns:
            Of the shape of `value`, with its gradient. Every expert counts once,
            however many devices have it.
        """
        return value

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

    def note_experts(self, variables: Iterable[Any]) -> None:
        """Takes note of weights of experts that Keras has made, and keeps alike.

        Args:
            variables: Keras variables.
        """

    def entries_here(self, variable: Any, values: Any) -> Any:
        """Those of an array that go with the part of a weight that is here.

        Args:
            variable: The weight `(E, ...)`, from `add_expert_weight`.
            values: `(E, ...)`, an array.

        Returns:
            A part of the array, or copies of it.
        """
        return values

    def left_out_here(self, variable: Any, flags: Any) -> Any:
        """As `entries_here`, so that what is not left out counts each expert once.

        Args:
            variable: The weight `(E, ...)`, from `add_expert_weight`.
            flags: `(E,)` bool, an array. True for experts to leave out.

        Returns:
            A part of the array, or longer by copies of experts, with True.
        """
        return self.entries_here(variable, flags)

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


class Replicas:
    """One replica, which has nobody to talk to.

    Attributes:
        number: How many replicas run the same code on parts of a batch.
        index: The one whose code runs here.
    """

    number = 1
    index = 0

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

    def before_loop(self, num_rows: tf.Tensor | int) -> Any:
        """A context for a loop whose steps are of these rows: what a gate may ask there.

        Replicas cannot talk within a loop, so what `num_before` says is asked before.

        Args:
            num_rows: Rows on this replica, in every step.
        """
        return contextlib.nullcontext()


class Engine:
    """One device. The base of every other engine.

    Attributes:
        weights: A `Weights`.
        replicas: A `Replicas`.
        operations: An `operations.Operations`.
        static_shapes: Whether shapes must not depend on the data. Padding then
            stays among the tokens, and an assignment may be -1.
        unrolls_loops: Whether a loop has no gradient here. Recurrences are then
            written out step by step, for a known number of them.
        has_experts: Whether replicas share experts. Each then updates its own part of a
            weight, a variable of its own.
        values_are_here: Whether a value can be looked at: on a mesh it lies on many
            devices.
        dispatcher: None, or `dispatcher(k, capacity_factor, most_experts)`, which
            makes what moves tokens to experts here (a `functional.Dispatcher`); k is
            how many experts a token has on average, if the gate says, and
            most_experts the most of a token where their number varies, else None.
            Nothing is dropped without a factor.
        hierarchical_mixture: None, or what takes the place of gate, experts and
            combination of a `HierarchicalMoE` here.
    """

    weights = Weights()
    replicas = Replicas()
    operations = operations.Operations()
    static_shapes = False
    unrolls_loops = False
    has_experts = False
    values_are_here = True
    dispatcher: Callable[..., Any] | None = None
    hierarchical_mixture: Callable[..., Any] | None = None

    def vocabulary_of(self, table: Any) -> Any:
        """A `distribution.vocabulary.Vocabulary` if the words of a table are shared out.

        Args:
            table: A variable that `add_table_weight` may have made, or anything else.

        Returns:
            How to use it and those like it here; None if all of it is here.
        """
        return None

    def note_layer(self) -> None:
        """Takes down that a layer of this package is built here."""

    def run_each(
        self,
        owner: Any,
        experts: Sequence[Any],
        calls: Sequence[Callable[[], tf.Tensor]],
    ) -> list[tf.Tensor]:
        """Calls experts that are Keras layers, each on its rows.

        Args:
            owner: The layer whose experts they are.
            experts: The layers.
            calls: For each of them what calls it.

        Returns:
            The answers.
        """
        return [call() for call in calls]

    @property
    def several_devices(self) -> bool:
        """Whether experts may live on another device than a token."""
        return self.replicas.number > 1

    @property
    def devices(self) -> str:
        """What it runs on, for messages."""
        return f"{self.replicas.number} replicas"


class StaticEngine(Engine):
    """One device where shapes must not depend on the data: XLA, and GPUs.

    XLA compiles nothing else, and on a GPU a size that depends on the data has to come
    to the host, which waits for it.
    """

    static_shapes = True
    operations = operations.StaticOperations()


ONE_DEVICE = Engine()
_STATIC = StaticEngine()

# Gives the engine of a strategy; set by `keras_moe.distribution`.
_engine_of: Callable[[Any], Engine] | None = None


def register(engine_of: Callable[[Any], Engine]) -> None:
    """Sets what turns a `tf.distribute.Strategy` into an `Engine`."""
    global _engine_of
    _engine_of = engine_of


def for_weights() -> Engine:
    """The engine for weights made here, in the scope of a strategy or not.

    Raises:
        ValueError: The strategy is of a kind that is not supported.
    """
    if _engine_of is None or not tf.distribute.has_strategy():
        return ONE_DEVICE
    return _engine_of(tf.distribute.get_strategy())


def note_layer() -> None:
    """Takes down that a layer without experts is built here.

    Where strategies are refused to experts, this does nothing.
    """
    with contextlib.suppress(ValueError):
        for_weights().note_layer()


def strategy_of(variable: Any) -> Any:
    """The strategy of a weight that `add_expert_weight` has made, or None."""
    return getattr(variable, "strategy", None)


def of_weight(variable: Any) -> Engine:
    """The engine of a weight that `add_expert_weight` has made, in any scope."""
    strategy = strategy_of(variable)
    return (
        ONE_DEVICE if strategy is None or _engine_of is None else _engine_of(strategy)
    )


def current() -> Engine:
    """The engine for a call that runs here.

    Outside of `strategy.run` a layer sees all experts and works on one device.

    Raises:
        ValueError: The strategy is of a kind that is not supported.
    """
    in_replica = not tf.distribute.in_cross_replica_context()
    here = for_weights() if in_replica else ONE_DEVICE
    if here is not ONE_DEVICE or runtime.only_plain():
        return here
    needs_static = is_compiled_by_xla() or runtime.device_type() == "GPU"
    return _STATIC if needs_static else here


def current_graph() -> Any:
    """The graph that is being traced here, None outside of graphs."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


def current_graphs() -> Iterator[Any]:
    """The graph that is being traced here, and those around it."""
    graph = current_graph()
    while graph is not None:
        yield graph
        graph = getattr(graph, "outer_graph", None)


def is_compiled_by_xla() -> bool:
    """Whether XLA compiles what is traced here, which then needs static shapes."""
    for graph in current_graphs():
        context = graph._get_control_flow_context()
        while context is not None:
            if context.IsXLAContext():
                return True
            context = context.outer_context
    return False


def verify_not_compiled(layer_name: str, remedy: str) -> None:
    """Raises where a function is traced that XLA is to compile, and could not.

    XLA itself fails only when the function runs, with a message about its nodes.

    Args:
        layer_name: Of the layer whose shapes depend on the data.
        remedy: What to do instead of leaving XLA out.
    """
    if is_compiled_by_xla():
        raise ValueError(
            f"`jit_compile` of a function that calls {layer_name} must be False: "
            "shapes depend on the data, which XLA cannot compile. Received: "
            f"jit_compile=True. Leave it out{remedy}."
        )


def current_replica() -> int | None:
    """Number of the replica whose code runs here, None between replicas."""
    if not tf.distribute.has_strategy():
        return 0
    context = tf.distribute.get_replica_context()
    if context is None:
        return None
    return int(tf.get_static_value(context.replica_id_in_sync_group))
