"""A callback that shows what the experts have specialized in."""

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_moe import checks, writing
from keras_moe.layers.moe import mixtures_of
from keras_moe.layers.routing_record import recorded_routing, routing_tensors
from keras_moe.telemetry.expert_contexts import (
    ExpertContexts,
    Routed,
    as_csv,
    as_text,
    expert_contexts,
)


class ExpertSpecialization(keras.callbacks.Callback):
    """Shows, for each expert, the contexts in which its gate is largest.

    The paper's table 9: the tokens of some batches are sorted by the gate of each
    expert, and the words around the first of them are printed. With labels (a part
    of speech, a language, a topic) it also says how much the choice of expert tells
    about them: their mutual information, next to what labels shuffled at random
    would give.

    When training ends the callback runs the model on the batches, without noise,
    and writes for each `MoE` `<layer>_experts.txt` and `.csv` into a
    folder. `analyze` does it at any other time.

    Args:
        batches: Iterable of what the model is called with; it is gone through
            again at every analysis, so no generator.
        words: Function of a batch: its tokens as strings, rows of the shape that
            the mixture sees, `(batch, time)`.
        folder: Str, path or None. Where to write when training ends. None writes
            nothing. Defaults to `None`.
        labels: Function of a batch, or None: labels, `(batch, time)`, or `(batch,)`
            for rows of one label. Labels are shuffled among tokens in the first
            case, among rows in the second. Defaults to `None`.
        label_name: Str. What the labels are, for the report. Defaults to `"label"`.
        call: Function of the model and a batch that runs the model; None means
            `model(batch, training=False)`. Defaults to `None`.
        num_contexts: Int. Contexts of an expert, at most. Defaults to `10`.
        window: Int. Words on either side of the token. Defaults to `6`.

    Raises:
        ValueError: A number is below 1; when it analyzes: the model has no `MoE` of
            several experts, a batch's words or labels are not as many as the tokens
            that the mixture saw, there are no batches or they can't be gone through
            again, or the folder can't be written. With a `folder` this is tried with
            the first batch when training begins.

    All assignments of all batches are held in memory: 100,000 tokens are plenty.

    Example:

    >>> moe = keras_moe.layers.MoE(keras_moe.layers.FeedForwardExperts(8, 16))
    >>> model = keras.Sequential([keras.layers.Embedding(3, 4), moe])
    >>> names = np.array(["", "big", "cat"])
    >>> shown = keras_moe.telemetry.ExpertSpecialization(
    ...     [np.array([[1, 2]])], words=lambda batch: names[batch]
    ... )
    >>> found = shown.analyze(model)[moe.name]
    >>> found.contexts[0][0].word, found.contexts[0][0].after
    ('big', 'cat')

    Reference:
        Shazeer et al. 2017, appendix E, table 9.
    """

    def __init__(
        self,
        batches: Iterable,
        words: Callable[[Any], Any],
        *,
        folder: str | os.PathLike | None = None,
        labels: Callable[[Any], Any] | None = None,
        label_name: str = "label",
        call: Callable[[Any, Any], Any] | None = None,
        num_contexts: int = 10,
        window: int = 6,
    ):
        super().__init__()
        self.batches = batches
        self.words = words
        self.folder = folder
        self.labels = labels
        self.label_name = label_name
        self.call = call
        self.num_contexts = checks.verify_positive_int(num_contexts, "num_contexts")
        self.window = checks.verify_positive_int(window, "window")

    def on_train_begin(self, logs=None):
        # What would fail after the training fails before it.
        if self.folder is not None:
            writing.verify_folder(self.folder, "folder")
            self._analyze(self.model, itertools.islice(self.batches, 1))

    def on_train_end(self, logs=None):
        if self.folder is not None:
            self.write(self.analyze(self.model), self.folder)

    def analyze(self, model: keras.Model) -> dict[str, ExpertContexts]:
        """Runs a model on the batches and finds its experts' contexts.

        Args:
            model: A built Keras model.

        Returns:
            Dict of layer name to `ExpertContexts`.
        """
        return self._analyze(model, self.batches)

    def _analyze(self, model, batches):
        mixtures = [layer for layer in mixtures_of(model) if layer.num_experts > 1]
        if not mixtures:
            raise ValueError(
                "`model` must have a `MoE` of several experts. Received: "
                f"{model.name!r} with 0 of them. Leave the callback out."
            )
        rows: list[list[str]] = []
        lengths: list[int] = []
        labels: list[np.ndarray] = []
        units: list[np.ndarray] = []
        routing: dict[str, list] = {layer.name: [] for layer in mixtures}
        if iter(self.batches) is self.batches:
            raise ValueError(
                "`batches` must be something to go through again at every analysis. "
                f"Received: batches={self.batches!r}, which is gone after one. Pass a "
                "list or a `tf.data.Dataset`."
            )
        for batch in batches:
            with recorded_routing(mixtures) as records:
                if self.call is None:
                    model(batch, training=False)
                else:
                    self.call(model, batch)
            words = np.asarray(self.words(batch), dtype=object)
            for name, (record, *_) in records.items():
                arrays = tuple(t.numpy() for t in routing_tensors(record))
                _verify_shape("words", words.shape, arrays[0].shape[:-1], name)
                routing[name].append(arrays)
            flat = words.reshape(-1, words.shape[-1])
            if self.labels is not None:
                of_batch, unit = self._labels_of(batch, words.shape)
                labels.append(of_batch)
                units.append(unit + (units[-1].max() + 1 if units else 0))
            rows += [list(map(str, row)) for row in flat]
            lengths += [flat.shape[1]] * len(flat)
        if not rows:
            raise ValueError(
                "`batches` must hold at least one batch, at every time it is gone "
                "through. Received: 0 batches. Pass a list or a `tf.data.Dataset`."
            )
        row: np.ndarray = np.repeat(np.arange(len(rows)), lengths)
        column = np.concatenate([np.arange(length) for length in lengths])
        return {
            layer.name: expert_contexts(
                layer.name,
                layer.num_experts,
                Routed(rows, row, column, *_joined(routing[layer.name])),
                labels=np.concatenate(labels) if labels else None,
                units=np.concatenate(units) if units else None,
                label_name=self.label_name,
                num_contexts=self.num_contexts,
                window=self.window,
            )
            for layer in mixtures
        }

    def _labels_of(self, batch, shape):
        """Label and unit of every token, `(N,)` each."""
        assert self.labels is not None
        labels = np.asarray(self.labels(batch))
        unit = np.arange(labels.size).reshape(labels.shape)
        if labels.shape == shape[:-1]:
            labels, unit = (
                np.broadcast_to(each[..., np.newaxis], shape) for each in (labels, unit)
            )
        _verify_shape("labels", labels.shape, shape, "the model")
        return labels.reshape(-1), unit.reshape(-1)

    @staticmethod
    def write(
        found: dict[str, ExpertContexts], folder: str | os.PathLike
    ) -> list[Path]:
        """Writes text and CSV for each mixture.

        Args:
            found: From `analyze`.
            folder: Where; it is made if it is missing.

        Returns:
            Paths of the files.
        """
        folder = writing.verify_folder(folder, "folder")
        written = []
        for name, of_layer in found.items():
            for suffix, render in (("txt", as_text), ("csv", as_csv)):
                path = folder / f"{name}_experts.{suffix}"
                writing.write_text(path, render(of_layer))
                written.append(path)
        return written


def _joined(arrays):
    """Experts and gates of all batches, `(N, k)`; k is the largest of them."""
    k = max(experts.shape[-1] for experts, _ in arrays)
    return tuple(
        np.concatenate([_widened(pair[i], k, filling) for pair in arrays])
        for i, filling in ((0, -1), (1, 0.0))
    )


def _widened(array, k, filling):
    flat = array.reshape(-1, array.shape[-1])
    return np.pad(flat, [(0, 0), (0, k - flat.shape[1])], constant_values=filling)


def _verify_shape(name, received, expected, layer):
    if tuple(received) != tuple(expected):
        raise ValueError(
            f"`{name}` must return one for each token that {layer} sees. Received: "
            f"shape {tuple(received)} for tokens of shape {tuple(expected)}."
        )
