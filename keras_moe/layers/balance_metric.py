"""Balance of the experts in the logs of `fit` and `evaluate`.

A layer that writes variables in evaluation would write them in an exported model
too. So there `call` only hands its statistics to the metric, as tensors of the graph
it runs in; Keras asks the metrics for their results at the end of a training or
test step, in the same graph, and there the statistics are added up. Prediction
and export never ask, so they contain no trace of it. In training they are added up
at once, as in batch normalization: a loop of one's own need not ask.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.types import GateStatistics

_TOTALS = (
    "importance",
    "counts",
    "overflow",
    "entropy",
    "tokens",
    "choices_kept",
    "noisy_tokens",
)


class BalanceMetric(checks.FromConfig, keras.metrics.Metric):
    """Importance and true load of the experts, added up since the last reset.

    Load is that of the experts that were chosen: with the gate's noise in training,
    without it in evaluation. If it is even in training and uneven in evaluation, the
    gate chooses by its noise.

    In a `tf.function` of one's own, training is counted by itself; an evaluation only
    if the function asks for `result()` after the call.

    `result()` gives, under names that begin with the layer's:

    * `importance_cv`: coefficient of variation of the importance;
    * `load_cv`: the same of the number of tokens of each expert;
    * `max_over_mean_load`: tokens of the busiest expert over the mean;
    * `overflow`: share of assignments dropped, only with a capacity;
    * `choices_kept`: share of a gate's choices that its noise leaves, only in
      training, of a gate with noise.

    Args:
        num_experts: Int. Number of experts.
        has_capacity: Bool. Whether to report overflow. Defaults to `False`.
        name: Prefix of the names, the name of the layer.
    """

    def __init__(self, num_experts, has_capacity=False, name=None):
        super().__init__(name=name, dtype="float32")
        self.num_experts = num_experts
        self.has_capacity = has_capacity
        # Counts in float64: a float32 sum stalls after 16 million tokens.
        self._importance = self.add_variable((num_experts,), "zeros", "float64")
        self._counts = self.add_variable((num_experts,), "zeros", "float64")
        self._overflow = self.add_variable((), "zeros", "float64")
        self._entropy = self.add_variable((), "zeros", "float64")
        self._tokens = self.add_variable((), "zeros", "float64")
        self._choices_kept = self.add_variable((), "zeros", "float64")
        self._noisy_tokens = self.add_variable((), "zeros", "float64")
        # The graphs, and those around them, in which a gate's noise was noted.
        self._noisy_graphs: weakref.WeakSet = weakref.WeakSet()
        # By replica: replicas are threads that share this object.
        self._pending = {}

    def record(
        self,
        statistics: GateStatistics,
        overflow: tf.Tensor,
        entropy: Callable[[], tuple[tf.Tensor, tf.Tensor]] | None = None,
        training: bool | None = False,
        choices_kept: Sequence[tf.Tensor] = (),
    ) -> None:
        """Takes note of one call of the layer, in evaluation without writing.

        Args:
            statistics: `GateStatistics` of the call.
            overflow: `()` int32, assignments dropped.
            entropy: Gives those of `functional.gate_entropy`; None where the gates
                of single tokens are not known.
            training: That of the call. In training the sums are updated at once.
                Defaults to `False`.
            choices_kept: Those of `functional.choices_kept`, if there was noise.
                Defaults to none.
        """
        if choices_kept:
            self._noisy_graphs.update(engine.current_graphs())

        def make():
            entropy_sum, num_tokens = (0.0, 0) if entropy is None else entropy()
            kept, noisy_tokens = choices_kept or (0.0, 0.0)
            return [
                tf.cast(tf.stop_gradient(statistics.importance), tf.float64),
                tf.cast(statistics.counts, tf.float64),
                tf.cast(overflow, tf.float64),
                tf.cast(tf.stop_gradient(entropy_sum), tf.float64),
                tf.cast(num_tokens, tf.float64),
                tf.cast(kept, tf.float64),
                tf.cast(noisy_tokens, tf.float64),
            ]

        if training and not tf.executing_eagerly():
            self._add(make())
            return
        pending = self._take_pending()
        if pending is None:
            self._set_pending(make)
        else:  # the layer is called more than once in a step
            self._set_pending(
                lambda: [a + b for a, b in zip(pending(), make(), strict=True)]
            )

    def update_state(self, statistics: GateStatistics, overflow: tf.Tensor) -> None:
        """Adds the statistics of one batch.

        Args:
            statistics: `GateStatistics` of the batch.
            overflow: `()` int32, assignments dropped.
        """
        self.record(statistics, overflow)
        self._fold()

    def result(self):
        self._fold()
        importance, counts = self._importance, self._counts
        results = {
            "importance_cv": tf.sqrt(functional.cv_squared(importance)),
            "load_cv": tf.sqrt(functional.cv_squared(counts)),
            "max_over_mean_load": functional.max_over_mean(counts),
        }
        if self.has_capacity:
            results["overflow"] = tf.math.divide_no_nan(
                tf.convert_to_tensor(self._overflow), tf.reduce_sum(counts)
            )
        if self._has_noise():
            results["choices_kept"] = tf.math.divide_no_nan(
                tf.convert_to_tensor(self._choices_kept),
                tf.convert_to_tensor(self._noisy_tokens),
            )
        return {f"{self.name}_{k}": tf.cast(v, tf.float32) for k, v in results.items()}

    def _has_noise(self):
        """Whether what is counted has noise: in a graph, what the graph counts."""
        graph = engine.current_graph()
        if graph is not None:
            return graph in self._noisy_graphs
        return bool(tf.convert_to_tensor(self._noisy_tokens) > 0)

    def counts(self):
        """`(num_experts,)` float64: tokens of each expert since the last reset."""
        self._fold()
        return tf.convert_to_tensor(self._counts)

    def totals(self) -> dict[str, Any]:
        """What was added up since the last reset, over all replicas.

        Outside of a step only. On several workers all must ask together.

        Returns:
            Dict of `importance` and `counts`, `(num_experts,)` float64; `overflow`,
            assignments dropped; `entropy`, the sum of the entropies of `tokens`
            tokens' gates, both 0 where they are not known; `choices_kept`, the sum
            of the shares of the choices that noise leaves `noisy_tokens` tokens.
        """
        self._fold()
        return {
            name: tf.convert_to_tensor(variable).numpy()
            for name, variable in zip(_TOTALS, self._sums(), strict=True)
        }

    def _sums(self):
        return (
            self._importance,
            self._counts,
            self._overflow,
            self._entropy,
            self._tokens,
            self._choices_kept,
            self._noisy_tokens,
        )

    def reset_state(self):
        self._pending.clear()
        super().reset_state()

    def _fold(self):
        pending = self._take_pending(is_asked=True)
        if pending is not None:
            self._add(pending())

    def _add(self, values):
        for variable, value in zip(self._sums(), values, strict=True):
            variable.assign(variable + value)

    def _take_pending(self, is_asked=False):
        """What was recorded in the present graph (or eagerly) and not yet added.

        Tensors of another graph (a prediction, an export) are of no use here.
        """
        pending = self._pending.pop(engine.current_replica(), None)
        if pending is None:
            return None
        graph, values = pending
        if graph is engine.current_graph():
            return values
        if is_asked and tf.executing_eagerly() and not tf.reduce_any(self._counts > 0):
            warnings.warn(
                f"{self.name}: nothing is counted. The layer ran without training in "
                "a function that did not ask for its balance, as in a prediction. "
                "Use `evaluate`, or call `balance.result()` of the layer inside the "
                "`tf.function` of your evaluation, after the model.",
                stacklevel=4,
            )
        return None

    def _set_pending(self, values):
        """Takes a function: what no step asks for leaves no operation in its graph."""
        if tf.executing_eagerly():  # now, or a long loop would hold all its calls
            made = values()
            values = lambda: made  # noqa: E731
        self._pending[engine.current_replica()] = (engine.current_graph(), values)
