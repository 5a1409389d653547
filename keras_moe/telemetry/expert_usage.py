"""A callback that watches how evenly the experts are used."""

import os
import warnings
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_moe import checks, writing
from keras_moe.layers.balance_metric import BalanceMetric
from keras_moe.telemetry import usage_picture
from keras_moe.telemetry.statistics import UsageTotals, usage_statistics

TRAIN, VALIDATION = "train", "validation"
# From which epoch on a gate that chooses by its noise is warned of, and from which
# coefficient of variation of the load in validation.
_FIRST_WARNING, _UNEVEN = 3, 0.5


class UsageRecord(NamedTuple):
    """The use of one mixture's experts over some batches.

    Attributes:
        step: Int. Training steps done at the end of these batches.
        totals: `UsageTotals` of these batches alone.
        figures: Dict of `usage_statistics`.
    """

    step: int
    totals: UsageTotals
    figures: dict[str, float]


class ExpertUsage(keras.callbacks.Callback):
    """Watches how evenly the experts of a model's mixtures are used.

    For every mixture of several experts (`MoE`, `HierarchicalMoE`, `MoELSTM`), in
    training and in validation: coefficients of variation of importance and load,
    largest over mean load, experts without a token, entropy of the gates, what
    a capacity has dropped, and in training the share of a gate's choices that its
    noise leaves. Loads are true counts. Under a strategy of several
    replicas they are those of the global batch.

    They go to

    * the Keras logs at the end of an epoch, over the whole epoch, as
      `<layer>_dead_experts` and so on, with `val_` for validation. Put the
      callback before others that are to see them (`CSVLogger`);
    * TensorBoard, if there is a `log_dir`: every `interval` training steps, over
      these steps, in the run `train`; of every validation in the run `validation`.
      Besides the figures, histograms of the experts' load and importance, each over
      its mean: at perfect balance all experts stand at 1;
    * `records`, and a picture drawn from them by `draw`.

    Statistics are added up inside the training step, where the layers' entries in
    the logs come from. Between two points of the log the callback does nothing but
    compare two integers; a point reads a few small variables and waits for the step
    before it.

    Args:
        log_dir: Str, path or None. TensorBoard folder; the runs are folders in it.
            None writes nothing. Defaults to `None`.
        interval: Int. Training steps between two points. Defaults to `100`.
        picture: Str, path or None. PNG to draw when training ends; needs
            matplotlib. Defaults to `None`.
        max_records: Int. Most records kept of each mixture and split; if there are
            more, neighbors are added together, so memory and the picture's width
            stay bounded. Defaults to `512`.

    Attributes:
        records: Dict of layer name to dict of `"train"` and `"validation"` to a list
            of `UsageRecord`.

    Raises:
        ValueError: `interval` or `max_records` is out of range; when training
            begins: the model has no mixture of several experts, or `log_dir` or
            `picture` can't be written.
        ImportError: When training begins: a picture is wanted without matplotlib.

    It warns, once for each mixture of a noisy gate, if the load is uneven in validation
    and even in training from the third epoch on (or the last, if there are fewer): the
    gate then chooses by its noise, see the guide to balancing.

    On several workers every worker needs the callback, since reading the sums is a
    collective; give each a `log_dir` of its own.

    The limit is that of the layers' logs: a mixture called inside the loop of
    another layer is not counted.

    Example:

    >>> moe = keras_moe.layers.MoE(keras_moe.layers.FeedForwardExperts(8, 16))
    >>> model = keras.Sequential([keras.Input((6,)), moe])
    >>> model.compile("sgd", "mse")
    >>> usage = keras_moe.telemetry.ExpertUsage()
    >>> x = np.ones((16, 6), "float32")
    >>> history = model.fit(x, x, batch_size=8, callbacks=[usage], verbose=0)
    >>> usage.records[moe.name]["train"][0].totals.counts.sum()  # 16 tokens, k = 4
    64.0

    Reference:
        Shazeer et al. 2017, section 4 and table 6.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike | None = None,
        *,
        interval: int = 100,
        picture: str | os.PathLike | None = None,
        max_records: int = 512,
    ):
        super().__init__()
        self.log_dir = log_dir
        self.interval = checks.verify_positive_int(interval, "interval")
        self.picture = picture
        self.max_records = checks.verify_int(max_records, "max_records", 2)
        self.records: dict[str, dict[str, list[UsageRecord]]] = {}
        self._writers: dict[str, Any] = {}
        self._first_step = 0  # of the present epoch
        self._batch = -1  # of the epoch, the last that has begun
        self._last = 0  # steps of the epoch before the last point
        self._before: dict[str, UsageTotals] = {}
        self._epoch_figures: dict[str, float] = {}
        self._is_part_ended = False
        self._training = False
        self._warned: set[str] = set()

    def on_train_begin(self, logs=None):
        if self.picture is not None:
            writing.verify_picture(self.picture, "picture")
        if self.log_dir is not None and "://" not in os.fspath(self.log_dir):
            writing.verify_folder(self.log_dir, "log_dir")
        if not self._metrics():
            raise ValueError(
                "`ExpertUsage` needs a model with a mixture of several experts. "
                f"Received: {self.model.name!r} with 0 of them. Leave the callback out."
            )
        self._training = True
        self._first_step = self._iterations()

    def on_epoch_begin(self, epoch, logs=None):
        self._batch = -1  # none has begun
        self._last = 0
        self._before = {}
        self._is_part_ended = False

    def on_train_batch_begin(self, batch, logs=None):
        # Here and not in `on_train_batch_end`, for which Keras would wait for the
        # results of every step.
        self._batch = batch
        if batch - self._last >= self.interval:
            self._take_window(batch)

    def on_test_begin(self, logs=None):
        # The layers' sums are about to be reset for the validation.
        if self._training:
            self._end_training_part()

    def on_test_end(self, logs=None):
        step = self._first_step if self._training else self._iterations()
        for name, metric in self._metrics().items():
            self._add(name, metric, VALIDATION, step, UsageTotals(**metric.totals()))
        self._flush()

    def on_epoch_end(self, epoch, logs=None):
        validated = self._is_part_ended
        self._end_training_part()
        if logs is not None:
            new = {**self._epoch_figures, **self._validation_figures(validated)}
            # The layers' own entries stay as they are.
            logs.update({k: v for k, v in new.items() if k not in logs})
        num_epochs = (self.params or {}).get("epochs") or 0
        if validated and epoch + 1 >= min(_FIRST_WARNING, num_epochs):
            self._warn_of_noise()
        self._flush()

    def _warn_of_noise(self):
        """Of gates that choose by their noise, once each."""
        gates = {
            layer.balance: layer.gating
            for layer in self.model._flatten_layers()
            if hasattr(layer, "balance") and hasattr(layer, "gating")
        }
        for name, metric in self._metrics().items():
            gate = gates.get(metric)
            noisy = getattr(gate, "has_noise", hasattr(gate, "noise_kernel"))
            if name in self._warned or not noisy:
                continue
            trained = self._epoch_figures[f"{name}_load_cv"]
            record = self.records[name][VALIDATION][-1]
            validated = record.figures["load_cv"]
            kept = self._epoch_figures.get(f"{name}_choices_kept")
            known = "" if kept is None else f", {name}_choices_kept={kept:.2f}"
            # So far apart are the experts of few tokens by chance alone.
            chance = (metric.num_experts / max(record.totals.counts.sum(), 1)) ** 0.5
            if validated > max(_UNEVEN, 4.0 * trained) + 2.0 * chance:
                self._warned.add(name)
                warnings.warn(
                    f"{name}: the load of the experts is even in training "
                    f"(load_cv={trained:.2f}) and uneven in validation without noise "
                    f"(val_{name}_load_cv={validated:.2f}, val_{name}_max_over_mean_"
                    f"load={record.figures['max_over_mean_load']:.1f}{known}). Either the "
                    "validation data are of another kind, or the gate chooses by its "
                    "noise more than by the token, which meets the balancing losses "
                    "without a choice. Lower `load_loss_weight` and `noise_epsilon`, "
                    "set or anneal the noise by `noise_stddev`, "
                    'start the gate with `gate_initializer="glorot_uniform"`, or use '
                    "`TopKGating`; train longer if this is an early epoch.",
                    stacklevel=2,
                )

    def on_train_end(self, logs=None):
        self._training = False
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        if self.picture is not None:
            self.draw(self.picture)

    def draw(self, path: str | os.PathLike) -> None:
        """Draws the load of every expert over the steps.

        Args:
            path: The PNG to write.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: There are no records yet, or `path` can't be written.
        """
        usage_picture.draw(self.records, path)

    def _metrics(self) -> dict[str, BalanceMetric]:
        """Those of the model's mixtures, by the name of the layer."""
        found: dict[str, BalanceMetric] = {}
        for metric in self.model.metrics:
            if isinstance(metric, BalanceMetric):
                name, number = metric.name, 1
                while name in found:  # layers of different sub-models
                    number += 1
                    name = f"{metric.name}_{number}"
                found[name] = metric
        return found

    def _iterations(self):
        optimizer = self.model.optimizer
        if optimizer is None:
            return 0
        return int(tf.convert_to_tensor(optimizer.iterations))

    def _steps_of_epoch(self):
        """How many were done, when no more begin."""
        if self._batch < 0:
            return 0
        if self.model.steps_per_execution == 1:
            return self._batch + 1
        return max(self._batch + 1, self._iterations() - self._first_step)

    def _take_window(self, steps):
        """A point of training, after so many steps of the epoch."""
        for name, metric in self._metrics().items():
            totals = UsageTotals(**metric.totals())
            window = totals.since(self._before.get(name))
            self._add(name, metric, TRAIN, self._first_step + steps, window)
            self._before[name] = totals
        self._last = steps

    def _end_training_part(self):
        """The last window of an epoch, and its figures as a whole; once an epoch."""
        if self._is_part_ended:
            return
        self._is_part_ended = True
        steps = self._steps_of_epoch()
        if steps > self._last:
            self._take_window(steps)
        self._first_step += steps
        self._epoch_figures = {
            f"{name}_{key}": value
            for name, metric in self._metrics().items()
            if name in self._before
            for key, value in usage_statistics(
                self._before[name], metric.has_capacity
            ).items()
        }

    def _validation_figures(self, validated):
        return {
            f"val_{name}_{key}": value
            for name, splits in self.records.items()
            if validated and splits[VALIDATION]
            for key, value in splits[VALIDATION][-1].figures.items()
        }

    def _add(self, name, metric, split, step, totals):
        figures = usage_statistics(totals, metric.has_capacity)
        splits = self.records.setdefault(name, {TRAIN: [], VALIDATION: []})
        records = splits[split]
        records.append(UsageRecord(step, totals, figures))
        if len(records) > self.max_records:
            splits[split] = _joined(records, metric.has_capacity)
        if self.log_dir is not None:
            folder = os.fspath(self.log_dir)
            self._write(folder, name, split, step, totals, figures)

    def _write(self, folder, name, split, step, totals, figures):
        if split not in self._writers:
            path = os.path.join(folder, split)
            self._writers[split] = tf.summary.create_file_writer(path)
        with self._writers[split].as_default(step):
            for key, value in figures.items():
                tf.summary.scalar(f"{name}/{key}", value)
            for key in ("counts", "importance"):
                values = getattr(totals, key)
                title = "load" if key == "counts" else key
                tf.summary.histogram(
                    f"{name}/{title}_over_mean", values / max(values.mean(), 1e-30)
                )

    def _flush(self):
        for writer in self._writers.values():
            writer.flush()


def _joined(records, has_capacity):
    """Neighbors added together; a last one without a neighbor stays."""
    joined = []
    for first, second in zip(records[::2], records[1::2], strict=False):
        totals = first.totals.plus(second.totals)
        figures = usage_statistics(totals, has_capacity)
        joined.append(UsageRecord(second.step, totals, figures))
    return joined + records[2 * len(joined) :]
