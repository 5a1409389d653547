"""Any Keras layers as experts."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine
from keras_moe.layers import configs
from keras_moe.layers.row_layers import run_any_rows, run_rows, verify_takes_rows
from keras_moe.layers.tracking import track_entries


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertList(keras.layers.Layer):
    """Experts that are Keras layers of any kind, alike or different.

    Each layer is called on the rows of its own tokens, a batch
    `(tokens, features)`; `training` is passed on. A layer that works on more
    axes takes its tokens through a `keras.Sequential` that begins with
    `Reshape`. Experts of one feed-forward shape run faster as
    `FeedForwardExperts`.

    An expert without tokens in a batch is called on one row of zeros whose
    answer is thrown away, since many layers fail on an empty batch. An expert
    that takes a `mask` (`BatchNormalization`, `MoE`, a `Sequential` of layers
    that all support masks) is told that this row, or an empty slot of a
    capacity, is not real.

    On several devices the weights are on all of them. Under a strategy of replicas an
    expert runs on one, with all its tokens; on a mesh every device runs all experts on
    its own tokens, and dropout in them is not that of one device.

    Args:
        experts: Sequence of layers, models or `Sequential`s, each with inputs
            `(tokens, features)`, all with outputs `(tokens, output_units)`. No
            layer may stand in it twice.

    Call arguments:
        inputs: Float tensor, `(rows, features)` sorted by expert, or
            `(num_experts, capacity, features)`.
        counts: int32 tensor `(num_experts,)`: rows of each expert. Needed for
            inputs of rank 2. For inputs of rank 3 also bool, `(num_experts,
            capacity)`: which slots hold a row.
        training: Bool. Passed on to every expert that takes it.

    Input shape:
        `(rows, features)` or `(num_experts, capacity, features)`.

    Output shape:
        The same with `output_units` in place of `features`.

    Losses and state:
        Those of the experts.

    Raises:
        ValueError: There is no expert, something is not a layer or stands in
            the list twice; an expert does not take rows; output shapes differ or
            are not `(tokens, output_units)`; `counts` is missing.

    Example:

    >>> experts = keras_moe.layers.ExpertList(
    ...     [keras.layers.Dense(8), keras.layers.Dense(8, activation="tanh")]
    ... )
    >>> layer = keras_moe.layers.MoE(experts, keras_moe.layers.NoisyTopKGating(k=1,
    ...     normalization="all"))
    >>> layer(np.ones((5, 8), "float32")).shape.as_list()
    [5, 8]

    Reference:
        Shazeer et al. 2017, section 2: experts only need equal sizes of input
        and output.
    """

    def __init__(self, experts: Sequence[keras.layers.Layer], **kwargs: Any):
        super().__init__(**kwargs)
        given = experts
        experts = list(experts) if isinstance(experts, Iterable) else []
        if not experts:
            raise ValueError(
                "`experts` must be a list of at least one layer. Received: "
                f"experts={given!r}. Put layers into a list."
            )
        for expert in experts:
            if not isinstance(expert, keras.layers.Layer):
                raise ValueError(
                    f"`experts` must be Keras layers. Received: {expert!r}."
                )
        if len({id(expert) for expert in experts}) < len(experts):
            names = [expert.name for expert in experts]
            raise ValueError(
                "`experts` must be different layers, or they would share their "
                f"weights. Received a layer more than once: {names}."
            )
        self.experts = experts
        track_entries(self, "experts")
        configs.hold(self, *experts)
        self.supports_jit = all(expert.supports_jit for expert in experts)

    # Their weights are those of Keras, not stacked: every device has all of them.
    experts_are_layers = True

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return len(self.experts)

    def build(self, input_shape):
        features = checks.verify_input_shape(input_shape, type(self).__name__)
        for expert in self.experts:
            verify_takes_rows(expert, features, "experts")
        engine.for_weights().weights.note_experts(self.weights)
        self._output_units(features)

    def call(self, inputs, counts=None, training=None):
        if inputs.shape.rank == 3:
            parts = tf.unstack(inputs, num=self.num_experts)
            # In int64, which a GPU compares; int32 would be compared by the host.
            slots = tf.cast(tf.range(tf.shape(inputs)[1]), tf.int64)
            masks: list[Any] = [None] * self.num_experts
            if counts is not None and counts.dtype == tf.bool:
                masks = tf.unstack(counts, num=self.num_experts)
            elif counts is not None:
                counts = tf.cast(counts, tf.int64)
                masks = [slots < n for n in tf.unstack(counts, num=self.num_experts)]
            return tf.stack(
                [
                    run_rows(expert, part, mask, training)
                    for expert, part, mask in zip(
                        self.experts, parts, masks, strict=True
                    )
                ]
            )
        if counts is None:
            raise ValueError(
                "`counts` is needed for inputs of rank 2, to know which rows are "
                f"whose. Received: inputs.shape={inputs.shape}, counts=None."
            )
        counts = checks.verify_counts(counts, self.num_experts, inputs)
        parts = tf.split(inputs, counts, num=self.num_experts)
        calls = [
            functools.partial(run_any_rows, expert, part, training)
            for expert, part in zip(self.experts, parts, strict=True)
        ]
        answers = engine.current().run_each(self, self.experts, calls)
        return tf.concat(answers, axis=0)

    def _output_units(self, features):
        shapes = [
            tuple(
                expert.compute_output_spec(
                    keras.KerasTensor((None, features), self.compute_dtype)
                ).shape
            )
            for expert in self.experts
        ]
        if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][-1] is None:
            listed = ", ".join(
                f"{e.name}: {s}" for e, s in zip(self.experts, shapes, strict=True)
            )
            raise ValueError(
                "All `experts` must map (tokens, features) to one shape (tokens, "
                f"output_units). Received outputs {listed} for features={features}."
            )
        return shapes[0][-1]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self._output_units(input_shape[-1]))

    def get_config(self):
        self._verify_apart()
        return {
            **super().get_config(),
            "experts": configs.serialize_all(self, self.experts),
        }

    def _verify_apart(self):
        """Keras would load a layer inside of two experts as two layers."""
        inside = [
            id(layer)
            for expert in self.experts
            for layer in {id(e): e for e in expert._flatten_layers()}.values()
        ]
        for expert in self.experts:
            for layer in expert._flatten_layers():
                if inside.count(id(layer)) > 1:
                    raise ValueError(
                        "`experts` must not share a layer to be written as a config. "
                        f"Received: layer {layer.name!r} inside of more than one "
                        "expert. Give each expert a layer of its own, or save the "
                        "weights alone: `save_weights`, `tf.train.Checkpoint`."
                    )

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        experts = configs.deserialize_all(config["experts"])
        return cls(**{**config, "experts": experts})
