"""Training a model on the sampled loss of its `SampledSoftmax`."""

from typing import TYPE_CHECKING, Any

import keras

_Model: Any = keras.Model if TYPE_CHECKING else object

# Set on the logits of a training step: what the softmax layer was given.
_INPUTS = "_keras_moe_softmax_inputs"


def with_softmax_inputs(logits, inputs):
    """Returns the logits, which then know what they were computed from."""
    setattr(logits, _INPUTS, inputs)
    return logits


class _GivenLosses(keras.losses.Loss):
    """Weights, masks and averages losses that were computed before."""

    def call(self, y_true, y_pred):
        return y_pred


class SampledTraining(_Model):
    """Takes the loss of a training step from `self.softmax`, not from logits.

    For a `keras.Model` with the attributes `num_sampled` and `softmax`, whose
    `call` marks its logits by `with_softmax_inputs` in training. The logits of a
    training step are then used by nothing, and no graph computes them.
    """

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        inputs = getattr(y_pred, _INPUTS, None)
        if inputs is None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        _verify_loss(self.loss)
        if y.shape.rank == inputs.shape.rank and y.shape[-1] == 1:
            y = y[..., 0]  # as Keras does it
        losses = self.softmax(inputs, targets=y, training=True)
        # As Keras does for the mask of the logits.
        losses._keras_mask = self.compute_mask(x)
        reduce = _GivenLosses(name="sampled_loss", dtype=losses.dtype)
        total = reduce(y, losses, sample_weight)
        # Older versions of Keras have no such method, but a sum in its place.
        aggregate = getattr(self, "_aggregate_additional_loss", keras.ops.sum)
        for loss in self.losses:
            total += aggregate(loss)
        return total

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if getattr(y_pred, _INPUTS, None) is None:
            return super().compute_metrics(x, y, y_pred, sample_weight)
        # Metrics of the logits would need all of them: evaluation has them.
        return self._results(of_logits=False)

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


def _verify_loss(loss):
    config: dict[str, Any] = getattr(loss, "get_config", dict)()
    if not (
        isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        and config.get("from_logits")
        and config.get("ignore_class") is None
        and config.get("reduction") == "sum_over_batch_size"
    ):
        raise ValueError(
            "`loss` must be keras.losses.SparseCategoricalCrossentropy("
            "from_logits=True) with `num_sampled`, which samples that loss in "
            f"training. Received: loss={loss!r}. Pass it, or num_sampled=None."
        )
