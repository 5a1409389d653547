"""The softmax over a large vocabulary, trained on a sample of it."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.functional.sampled_softmax import cross_entropy_of_candidates


@keras.saving.register_keras_serializable(package="keras_moe")
class SampledSoftmax(checks.FromConfig, keras.layers.Layer):
    """Logits of a large vocabulary; in training a loss that needs few of them.

    With targets in training, `num_sampled` candidates are drawn from the
    log-uniform distribution without repetition, the same for the whole batch, and
    the normalizer of the softmax is estimated from them:

    $L = \\log\\left(e^{s_t} + \\sum_{c \\in C, c \\ne t} e^{s_c} / q_c\\right) - s_t$,

    $q_c$ being the expected count of candidate c; a candidate that is the target
    (an accidental hit) is removed. The cost of a step grows with `num_sampled` and
    not with the vocabulary. Otherwise the softmax is the full one: with targets at
    inference this returns the exact cross-entropy, and without targets the logits.

    Word ids must be in the order of falling frequency, for which the log-uniform
    distribution is made; `keras_moe.data.Vocabulary` has them so.

    The normalizer is estimated without bias. Its logarithm, the loss, is a little
    too low, by half the relative variance of the normalizer, which falls as
    `num_sampled` rises.

    Args:
        vocabulary_size: Int. Number of words, V.
        num_sampled: Int. Candidates of a batch, below V. Defaults to `8192`.
        kernel_initializer: Initial value of the kernel. Defaults to
            `"glorot_uniform"`.
        bias_initializer: Initial value of the bias. Defaults to `"zeros"`.
        seed: Int or None. Seed of the candidates. Defaults to `None`: that of
            `keras.utils.set_random_seed`.

    Call arguments:
        inputs: Float tensor `(..., features)`.
        targets: Int tensor of the leading dimensions, or None.
        training: Bool. Whether to sample.

    Input shape:
        `(..., features)`, rank 2 or more.

    Output shape:
        Without targets logits `(..., vocabulary_size)`; with targets losses of
        the leading dimensions.

    Losses and state:
        Weights `kernel` `(vocabulary_size, features)` and `bias`
        `(vocabulary_size,)`. Adds no losses.

    Raises:
        ValueError: A size is not positive, `num_sampled` is not below
            `vocabulary_size`, or targets are not integers.

    Mixed precision: scores and losses are float32 under every policy.

    Several devices may share the words out, see `distribution.shard_vocabulary`. All then
    have the candidates that the first one has drawn.

    XLA: `jit_compile=True` works. XLA has no candidate sampler: candidates are then
    drawn by `functional.log_uniform_candidates`, and `seed` is not used. So they are on a
    mesh of DTensor, from `seed` and the number of the draw.

    Example:

    >>> softmax = keras_moe.layers.SampledSoftmax(1000, num_sampled=50)
    >>> hidden, targets = np.ones((2, 5, 8), "float32"), np.ones((2, 5), "int32")
    >>> softmax(hidden).shape.as_list()
    [2, 5, 1000]
    >>> softmax(hidden, targets=targets, training=True).shape.as_list()
    [2, 5]

    Reference:
        Jozefowicz et al. 2016, section 3.1; Shazeer et al. 2017, appendix C.1.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_sampled: int = 8192,
        *,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        seed: int | None = None,
        **kwargs: Any,
    ):
        vocabulary_size = checks.verify_positive_int(vocabulary_size, "vocabulary_size")
        num_sampled = checks.verify_positive_int(num_sampled, "num_sampled")
        if num_sampled >= vocabulary_size:
            raise ValueError(
                "`num_sampled` must be below `vocabulary_size`. Received: "
                f"num_sampled={num_sampled}, vocabulary_size={vocabulary_size}. "
                "Lower it, or use a Dense layer for a small vocabulary."
            )
        # Scores in float32 also under a half-precision policy.
        super().__init__(autocast=False, **kwargs)
        self.vocabulary_size = vocabulary_size
        self.num_sampled = num_sampled
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.seed = checks.verify_seed(seed)
        self._draws = _Draws()

    def build(self, input_shape):
        features = checks.verify_input_shape(input_shape, type(self).__name__)
        add_table_weight = engine.for_weights().weights.add_table_weight
        self.kernel = add_table_weight(
            self,
            (self.vocabulary_size, features),
            self.kernel_initializer,
            "kernel",
            autocast=False,
        )
        self.bias = add_table_weight(
            self,
            (self.vocabulary_size,),
            self.bias_initializer,
            "bias",
            autocast=False,
        )

    @property
    def vocabulary(self) -> Any:
        """How to use the kernel if its words are shared out here, else None."""
        return engine.current().vocabulary_of(getattr(self, "kernel", None))

    def call(self, inputs, targets=None, training=None):
        checks.verify_floating(inputs.dtype, type(self).__name__)
        inputs = tf.cast(inputs, self.variable_dtype)
        if targets is None:
            return self._logits(inputs)
        targets = checks.verify_ids(targets, "targets", self.vocabulary_size)
        shape = inputs.shape[:-1]
        checks.verify_shape(shape, "a word for each row of `inputs`", targets=targets)
        if training:
            losses = self._sampled_losses(inputs, targets)
        else:
            losses = self._full_losses(inputs, targets)
        return tf.reshape(losses, tf.shape(inputs)[:-1])

    def _full_losses(self, inputs, targets):
        vocabulary = self.vocabulary
        if vocabulary is not None:
            return vocabulary.cross_entropy(inputs, self.kernel, self.bias, targets)
        logits = tf.reshape(self._logits(inputs), (-1, self.vocabulary_size))
        return functional.cross_entropy(logits, tf.reshape(targets, (-1,)))

    def _sampled_losses(self, inputs, targets):
        candidates, expected_counts = self.sample()
        expected_counts = tf.cast(expected_counts, inputs.dtype)
        vocabulary = self.vocabulary
        rows = tf.reshape(inputs, (-1, inputs.shape[-1]))
        if vocabulary is None:
            return functional.sampled_cross_entropy(
                rows,
                self.kernel.value,
                self.bias.value,
                tf.reshape(targets, (-1,)),
                candidates,
                expected_counts,
            )
        # Every device has drawn its own.
        candidates, expected_counts = vocabulary.agreed([candidates, expected_counts])
        tables = (self.kernel, self.bias)
        kernel, bias = vocabulary.rows(tables, targets)
        return cross_entropy_of_candidates(
            rows,
            (tf.reshape(kernel, (-1, inputs.shape[-1])), tf.reshape(bias, (-1,))),
            vocabulary.common_rows(tables, candidates),
            tf.reshape(targets, (-1,)),
            candidates,
            expected_counts,
        )

    def sample(self):
        """Draws candidates.

        Returns:
            candidates: `(num_sampled,)` int64, all different.
            expected_counts: `(num_sampled,)` float32, the chance of each to be
                drawn; see `functional.unbiased_candidates`.
        """
        if not engine.current().values_are_here:  # a mesh, which has no sampler either
            uniform = self._draws.uniform(self.vocabulary_size, self.seed)
            return functional.log_uniform_candidates(uniform, self.num_sampled)
        if engine.is_compiled_by_xla():  # which has no such sampler
            uniform = tf.random.uniform((self.vocabulary_size,), seed=self.seed)
            return functional.log_uniform_candidates(uniform, self.num_sampled)
        sampled = tf.random.log_uniform_candidate_sampler(
            tf.zeros((1, 1), tf.int64),  # its targets, of which no use is made
            num_true=1,
            num_sampled=self.num_sampled + 1,
            unique=True,
            range_max=self.vocabulary_size,
            seed=self.seed,
        )
        return functional.unbiased_candidates(
            sampled.sampled_candidates,
            sampled.sampled_expected_count,
            self.vocabulary_size,
        )

    def _logits(self, inputs):
        vocabulary = self.vocabulary
        if vocabulary is not None:
            return vocabulary.logits(inputs, self.kernel, self.bias)
        kernel = tf.transpose(tf.convert_to_tensor(self.kernel))
        return tf.tensordot(inputs, kernel, axes=1) + self.bias

    def compute_output_shape(self, inputs_shape, targets_shape=None):
        if targets_shape is not None:
            return tuple(inputs_shape[:-1])
        return (*inputs_shape[:-1], self.vocabulary_size)

    def get_config(self):
        config = super().get_config()
        config.pop("autocast", None)
        return {
            **config,
            "vocabulary_size": self.vocabulary_size,
            "num_sampled": self.num_sampled,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "seed": self.seed,
        }


class _Draws:
    """Random numbers of each draw where operations keep no state, out of Keras' sight."""

    def __init__(self):
        self._seed = self._count = None

    def uniform(self, number, seed):
        """`(number,)` float32, others in every step."""
        here = engine.current()
        if self._count is None:
            self._seed = np.random.randint(2**31) if seed is None else seed
            self._count = here.weights.local_variable(
                lambda: tf.constant(0, tf.int64), ()
            )
        self._count.assign_add(tf.constant(1, tf.int64))
        count = tf.convert_to_tensor(self._count)
        key = tf.stack([tf.constant(self._seed, tf.int64), count])
        drawn = tf.random.stateless_uniform((number,), key)
        return here.operations.replicated(drawn)
