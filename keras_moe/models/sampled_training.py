"""Losses of a model that its softmax computes, without logits of all words."""

import contextlib
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from keras_moe.functional.full_softmax import as_losses

_Model: Any = keras.Model if TYPE_CHECKING else object

# Set on the logits of a step, or on what it has in their place.
_PENDING = "_keras_moe_pending"

_steps = threading.local()  # replicas are threads


@dataclasses.dataclass
class _Pending:
    """What becomes of the logits of a step.

    Attributes:
        inputs: What the softmax is given.
        sampled: Whether the loss is that of a sample of the words.
        losses: Of the tokens, once they were computed.
    """

    inputs: tf.Tensor
    sampled: bool
    losses: tf.Tensor | None = None


def scores_of(softmax: Any, inputs: tf.Tensor, sampled: bool) -> tf.Tensor:
    """Logits, which know what they were computed from where the loss needs that.

    Args:
        softmax: The softmax layer.
        inputs: What it is given.
        sampled: Whether the loss is that of a sample of the words.

    Returns:
        `softmax(inputs)`; in a step in which devices share the words out `inputs`, which
        stand for the logits.
    """
    waits = getattr(_steps, "softmax", None) is softmax
    scores = tf.identity(inputs) if waits else softmax(inputs)
    if waits or sampled:
        setattr(scores, _PENDING, _Pending(inputs, sampled))
    return scores


@contextlib.contextmanager
def _waiting(softmax):
    """A context in which logits of shared words are made if something asks for them."""
    before = getattr(_steps, "softmax", None)
    _steps.softmax = softmax if getattr(softmax, "vocabulary", None) else None
    try:
        yield
    finally:
        _steps.softmax = before


class _GivenLosses(keras.losses.Loss):
    """Weights, masks and averages losses that were computed before."""

    def call(self, y_true, y_pred):
        return y_pred


class SampledTraining(_Model):
    """Takes the loss of a step from `self.softmax`, not from logits.

    For a `keras.Model` with the attributes `num_sampled` and `softmax`, whose `call`
    makes its logits by `scores_of`. The logits of a step of sampled training are then
    used by nothing, and no graph computes them. Where several devices share the words
    out, no step of training or evaluation has logits, unless a loss or metric asks.
    """

    def train_step(self, data):
        with _waiting(self.softmax):
            return super().train_step(data)

    def test_step(self, data):
        with _waiting(self.softmax):
            return super().test_step(data)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        pending = getattr(y_pred, _PENDING, None)
        if pending is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        inputs = pending.inputs
        if not _is_of_tokens(self.loss):
            if pending.sampled:
                raise ValueError(
                    "`loss` must be keras.losses.SparseCategoricalCrossentropy("
                    "from_logits=True) with `num_sampled`, which samples that loss in "
                    f"training. Received: loss={self.loss!r}. Pass it, or "
                    "num_sampled=None."
                )
            logits = self._logits(x, inputs)
            return super().compute_loss(x, y, logits, sample_weight, training)
        if y.shape.rank == inputs.shape.rank and y.shape[-1] == 1:
            y = y[..., 0]  # as Keras does it
        if self.num_sampled is None:
            losses = self.softmax.losses_of(inputs, y)
        else:
            losses = self.softmax(inputs, targets=y, training=pending.sampled)
        # As Keras does for the mask of the logits.
        losses._keras_mask = self.compute_mask(x)
        pending.losses = losses
        reduce = _GivenLosses(name="sampled_loss", dtype=losses.dtype)
        total = reduce(y, losses, sample_weight)
        # Older versions of Keras have no such method, but a sum in its place.
        aggregate = getattr(self, "_aggregate_additional_loss", keras.ops.sum)
        for loss in self.losses:
            total += aggregate(loss)
        return total

    def _logits(self, x, inputs):
        logits = self.softmax(inputs)
        logits._keras_mask = self.compute_mask(x)
        return logits

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        pending = getattr(y_pred, _PENDING, None)
        if pending is None:
            return super().compute_metrics(x, y, y_pred, sample_weight)
        if pending.sampled:
            # Metrics of the logits would need all of them: evaluation has them.
            return self._results(of_logits=False)
        if pending.losses is not None and self._metrics_take_losses():
            y_pred = as_losses(pending.losses)
        else:
            y_pred = self._logits(x, pending.inputs)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def _metrics_take_losses(self):
        """Whether all metrics of `compile` can be made of losses, as perplexities."""
        # As given to `compile`: the first replica builds them, and all have to agree.
        names = ("_user_metrics", "_user_weighted_metrics")
        given = [
            getattr(group, name, "unknown")
            for group in self.metrics
            if group.name == "compile_metrics"
            for name in names
        ]
        every = keras.tree.flatten(given)
        return all(m is None or hasattr(m, "takes_losses") for m in every)

    def get_metrics_result(self):
        # After an epoch, too, when no step has shown logits to the metrics.
        return self._results(of_logits=True)

    def _results(self, of_logits):
        results = {}
        for metric in self.metrics:
            if metric.name == "compile_metrics" and not (of_logits and metric.built):
                continue
            result = metric.result()
            results.update(
                result if isinstance(result, dict) else {metric.name: result}
            )
        return results


def _is_of_tokens(loss):
    config: dict[str, Any] = getattr(loss, "get_config", dict)()
    return (
        isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        and config.get("from_logits")
        and config.get("ignore_class") is None
        and config.get("reduction") == "sum_over_batch_size"
    )
