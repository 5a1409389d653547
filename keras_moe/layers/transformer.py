"""A block of a transformer whose feed-forward network may be a mixture of experts."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks
from keras_moe.layers import configs, masks
from keras_moe.layers.cached_attention import CachedAttention
from keras_moe.layers.causality import verify_causal
from keras_moe.layers.dropout import Dropout
from keras_moe.layers.moe import MoE, default_name
from keras_moe.layers.row_layers import run_rows
from keras_moe.layers.transformer_checks import (
    verify_attention,
    verify_call,
    verify_has_cache,
    verify_mixture,
    verify_normalization,
    verify_room,
    verify_source,
    verify_width,
)


@keras.saving.register_keras_serializable(package="keras_moe")
class MoETransformerBlock(keras.layers.Layer):
    """Attention and a feed-forward network, which may be a mixture of experts.

    $h = x + \\mathrm{attend}(\\mathrm{norm}(x))$, $y = h + \\mathrm{ff}(\\mathrm{norm}(h))$;
    between the two in the same way the attention to an encoder, where there is one. Stack
    such blocks, every second with `moe`, the others with a dense network. All positions
    of all sequences are one batch of tokens to the mixture.

    Args:
        attention: Int, the heads of a `CachedAttention`; or a layer for the
            self-attention, such as `keras.layers.MultiHeadAttention`, called with query
            and value, and `attention_mask`. That to an encoder is a copy of it, without
            the rotary positions of a `CachedAttention`.
        moe: A `MoE` or `HierarchicalMoE` that keeps the width, or None for a dense
            network. Defaults to `None`.
        feed_forward: What a block without a mixture has: an int, the hidden units of a
            network of two kernels with a GELU between, or a layer that keeps the width
            and gets the mask if its `call` takes one. None, without `moe`, means four
            times the width. Defaults to `None`.
        causal: Bool. Whether a position attends to itself and earlier ones only, as in
            a decoder. Defaults to `False`.
        num_key_value_heads: Of the `CachedAttention`. Defaults to `None`.
        max_wavelength: Float or None, of the `CachedAttention`: rotary positions in the
            self-attention. Defaults to `None`.
        normalization: A layer, for example `keras.layers.RMSNormalization()`; the second
            and third place get copies. None means
            `keras.layers.LayerNormalization(epsilon=1e-5)`. Defaults to `None`.
        normalize_first: Bool. Whether the inputs of attention and network are
            normalized (pre-norm), rather than the sums, `norm(x + attend(x))`. Defaults
            to `True`.
        dropout: Float. Fraction of the outputs of attention and network that is dropped
            in training. Defaults to `0.0`.

    Call arguments:
        inputs: Float tensor `(batch, time, features)`.
        encoder_outputs: Float tensor `(batch, source, encoder features)` to attend to,
            or None. Always or never: it decides which weights there are.
        mask: Bool tensor `(batch, time)` or None. Positions marked False (padding) are
            neither attended to nor routed, whatever they hold.
        encoder_outputs_mask: Bool tensor `(batch, source)` or None, likewise.
        attention_mask: Bool tensor that broadcasts to `(batch, time, time)`, or None:
            True where a position (axis 1) may attend to another, besides the other
            masks.
        training: Bool. Whether there is dropout, noise of the gate and its losses.

    Input shape:
        `(batch, time, features)`; batch and time may be unknown.

    Output shape:
        The input shape. What comes out at padding says nothing.

    Losses and state:
        The losses of the mixture. Weights of the parts.

    Raises:
        ValueError: `attention` is neither an int nor a layer; both of `moe` and
            `feed_forward`; `moe` is no mixture, or `feed_forward` is one; with `causal`
            a gate in either sees other tokens; a layer changes the width; masks,
            encoder outputs or a cache do not fit the inputs.

    Decoding: `call_with_cache` takes some positions at a time and keeps keys and values.
    The results are those of all at once if the tokens do not compete, as they do with
    `evaluation_capacity_factor`.

    Mixed precision: gate, softmax and angles are float32 at least.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(8, hidden_units=32)
    >>> block = keras_moe.layers.MoETransformerBlock(
    ...     4, keras_moe.layers.MoE(experts), causal=True, max_wavelength=10000.0
    ... )
    >>> block(np.ones((2, 5, 16), "float32")).shape.as_list()
    [2, 5, 16]

    Reference:
        Vaswani et al. 2017, "Attention is all you need"; Xiong et al. 2020, "On layer
        normalization in the transformer architecture"; Lepikhin et al. 2020, "GShard",
        for mixtures in every second block.
    """

    def __init__(
        self,
        attention: int | keras.layers.Layer,
        moe: MoE | None = None,
        *,
        feed_forward: int | keras.layers.Layer | None = None,
        causal: bool = False,
        num_key_value_heads: int | None = None,
        max_wavelength: float | None = None,
        normalization: keras.layers.Layer | None = None,
        normalize_first: bool = True,
        dropout: float = 0.0,
        name: str | None = None,
        **kwargs: Any,
    ):
        name = name or default_name("moe_transformer_block")
        super().__init__(name=name, **kwargs)
        num_heads = verify_attention(attention, num_key_value_heads, max_wavelength)
        verify_mixture(moe, feed_forward)
        verify_normalization(normalization)
        policy = self.dtype_policy
        self.num_heads = num_heads
        self.moe = moe
        self.causal = bool(causal)
        self.num_key_value_heads = num_key_value_heads
        self.max_wavelength = max_wavelength
        self.normalize_first = bool(normalize_first)
        self.dropout = checks.verify_rate(dropout, "dropout")
        if num_heads is not None:
            attention = CachedAttention(
                num_heads,
                num_key_value_heads,
                max_wavelength=max_wavelength,
                dtype=policy,
                name="attention",
            )
        if normalization is None:
            normalization = keras.layers.LayerNormalization(epsilon=1e-5, dtype=policy)
        self.attention: Any = attention
        self.normalization = normalization
        self.feed_forward_normalization = _copy(normalization, "feed_forward_norm")
        if feed_forward is not None and not isinstance(
            feed_forward, keras.layers.Layer
        ):
            feed_forward = checks.verify_positive_int(feed_forward, "feed_forward")
        self.feed_forward = feed_forward
        self.attention_dropout = Dropout(self.dropout, dtype=policy)
        self.feed_forward_dropout = Dropout(self.dropout, dtype=policy)
        self.supports_masking = True
        configs.hold(self, moe, feed_forward, attention, normalization)
        self._verify_causal()

    @property
    def _network(self):
        """The feed-forward part that is given, None for the two dense layers."""
        given = self.feed_forward
        return given if isinstance(given, keras.layers.Layer) else self.moe

    def build(self, inputs_shape, encoder_outputs_shape=None):
        features = checks.verify_input_shape(inputs_shape, type(self).__name__)
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={-1: features})
        shape = (None, None, features)
        self.has_encoder = encoder_outputs_shape is not None
        _build(self.attention, shape, shape)
        _build(self.normalization, shape)
        _build(self.feed_forward_normalization, shape)
        if self.has_encoder:
            source = (None, None, encoder_outputs_shape[-1])
            # Positions of a source are none of the target.
            turns = isinstance(self.attention, CachedAttention)
            own = {"max_wavelength": None} if turns else {}
            self.cross_attention = _copy(self.attention, "cross_attention", **own)
            self.cross_normalization = _copy(self.normalization, "cross_norm")
            self.cross_dropout = Dropout(self.dropout, dtype=self.dtype_policy)
            _build(self.cross_attention, shape, source)
            _build(self.cross_normalization, shape)
            self.cross_dropout.build(shape)
        for dropout in (self.attention_dropout, self.feed_forward_dropout):
            dropout.build(shape)
        if self._network is not None:
            _build(self._network, shape)
            verify_width(self._network, features)
            return
        units = self.feed_forward or 4 * features
        options = {"dtype": self.dtype_policy}
        self.hidden_dense = keras.layers.Dense(units, "gelu", name="hidden", **options)
        self.output_dense = keras.layers.Dense(features, name="output", **options)
        self.hidden_dense.build(shape)
        self.output_dense.build((None, None, units))

    def call(
        self,
        inputs,
        encoder_outputs=None,
        mask=None,
        encoder_outputs_mask=None,
        attention_mask=None,
        training=None,
    ):
        self._verify_call(inputs, encoder_outputs is not None)
        if mask is None:  # with an encoder Keras looks for another name
            mask = getattr(inputs, "_keras_mask", None)
        mask = masks.as_mask(mask, inputs, "mask")
        verify_source(encoder_outputs, inputs)
        source, source_mask = masks.source(encoder_outputs, encoder_outputs_mask)
        seen = masks.among(mask, mask)
        seen = masks.both(seen, masks.of_pairs(attention_mask, inputs, inputs))
        if self.causal:
            positions = masks.positions_from(0, tf.shape(inputs)[1])
            seen = masks.both(
                seen, positions[:, tf.newaxis] <= positions[..., tf.newaxis]
            )

        def attend(x):
            return self.attention(x, x, attention_mask=seen)

        def attend_to_encoder(x):
            seen = masks.among(mask, source_mask)
            return self.cross_attention(x, source, attention_mask=seen)

        return self._run(inputs, attend, attend_to_encoder, mask, training)

    def call_with_cache(
        self,
        inputs,
        cache: dict[str, Any],
        index: Any,
        *,
        mask=None,
        attention_mask=None,
        encoder_outputs_mask=None,
    ) -> tuple[Any, dict[str, Any]]:
        """Some positions after those that the cache holds, in inference.

        Args:
            inputs: Float tensor `(batch, time, features)`: one position, or several.
            cache: From `initial_cache` or an earlier call.
            index: Int, or int tensor `()` or `(batch,)`. The position of the first of
                `inputs`, for all rows or each.
            mask: Bool tensor `(batch, time)` or None. Positions marked False are not
                routed. They are in the cache: give those to be overwritten (padding
                after a text that will go on), or an `attention_mask`. Defaults to
                `None`.
            attention_mask: Bool tensor that broadcasts to `(batch, time, length)`, or
                None: which of the positions written may be attended to; a causal block
                sees those up to the position itself. Defaults to `None`: all.
            encoder_outputs_mask: Bool tensor `(batch, source)` or None. Defaults to
                `None`.

        Returns:
            outputs: As those of the call with all positions.
            cache: The cache to go on with.

        Raises:
            ValueError: The attention takes no cache; positions, but for those that
                `mask` leaves out, are not within it; rows differ in number.
        """
        verify_has_cache(self.attention, "call_with_cache")
        self._verify_call(inputs, "encoder" in cache)
        inputs = tf.cast(inputs, self.compute_dtype)  # `__call__` would
        mask = masks.as_mask(mask, inputs, "mask")
        verify_room(cache, inputs, index, mask)
        keys = tf.range(tf.shape(cache["self"])[2])
        last = masks.positions_from(index, tf.shape(inputs)[1])
        if not self.causal:
            last = last[:, -1:]
        seen = keys <= last[..., tf.newaxis]  # (1 or batch, time or 1, length)
        kept = cache["self"][:, 0]
        seen = masks.both(seen, masks.of_pairs(attention_mask, inputs, kept))
        cache = dict(cache)

        def attend(x):
            place = {"cache": cache["self"], "cache_update_index": index}
            outputs, cache["self"] = self.attention(x, x, attention_mask=seen, **place)
            return outputs

        def attend_to_encoder(x):
            kept = cache["encoder"]
            _, seen = masks.source(kept[:, 0], encoder_outputs_mask)
            seen = masks.among(None, seen)
            return self.cross_attention(x, x, attention_mask=seen, cache=kept)[0]

        outputs = self._run(inputs, attend, attend_to_encoder, mask, False)
        return outputs, cache

    def initial_cache(
        self,
        batch_size: Any,
        length: Any,
        encoder_outputs=None,
        encoder_outputs_mask=None,
    ) -> dict[str, Any]:
        """An empty cache for `call_with_cache`.

        Args:
            batch_size: Int or scalar int tensor.
            length: Int or scalar int tensor. Positions that it has room for.
            encoder_outputs: Float tensor `(batch, source, encoder features)`, whose keys
                and values are computed here, or None. Defaults to `None`.
            encoder_outputs_mask: Bool tensor `(batch, source)` or None. Defaults to
                `None`.

        Returns:
            By name, `"self"` and with an encoder `"encoder"`, tensors
            `(batch, 2, positions, heads, features of a head)`.

        Raises:
            ValueError: The attention has no cache of this kind.
        """
        verify_has_cache(self.attention, "initial_cache")
        self._verify_call(None, encoder_outputs is not None)
        cache = {"self": self.attention.initial_cache(batch_size, length)}
        if encoder_outputs is not None:
            source, _ = masks.source(encoder_outputs, encoder_outputs_mask)
            cache["encoder"] = self.cross_attention.cache_of(source)
        return cache

    def _verify_call(self, inputs, has_encoder):
        verify_call(self, inputs, has_encoder)
        self._verify_causal()  # parts may have been exchanged since

    def _verify_causal(self):
        if self.causal:
            networks = [self.feed_forward, getattr(self, "output_dense", None)]
            verify_causal([self.moe], "moe", "a causal block")
            verify_causal(networks, "feed_forward", "a causal block")

    def _run(self, inputs, attend, attend_to_encoder, mask, training):
        def network(x):
            if self._network is not None:
                return run_rows(self._network, x, mask, training)
            # Mixtures may have taken the place of the two (`upcycle`).
            return run_rows(self.output_dense, self.hidden_dense(x), mask, training)

        branches = [(attend, self.normalization, self.attention_dropout)]
        if self.has_encoder:
            parts = self.cross_normalization, self.cross_dropout
            branches.append((attend_to_encoder, *parts))
        parts = self.feed_forward_normalization, self.feed_forward_dropout
        branches.append((network, *parts))
        x = masks.without_padding(inputs, mask)
        for branch in branches:
            x = self._add(x, *branch, training)
        return x

    def _add(self, x, branch, normalization, dropout, training):
        """The residual around attention or network."""
        if self.normalize_first:
            return x + dropout(branch(normalization(x)), training=training)
        return normalization(x + dropout(branch(x), training=training))

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, inputs_shape, encoder_outputs_shape=None):
        return inputs_shape

    def get_config(self):
        feed_forward = self.feed_forward
        if isinstance(feed_forward, keras.layers.Layer):
            feed_forward = configs.serialize(self, feed_forward, 1)
        return {
            **super().get_config(),
            "attention": self.num_heads or configs.serialize(self, self.attention, 2),
            "moe": configs.serialize(self, self.moe),
            "feed_forward": feed_forward,
            "causal": self.causal,
            "num_key_value_heads": self.num_key_value_heads,
            "max_wavelength": self.max_wavelength,
            "normalization": configs.serialize(self, self.normalization, 3),
            "normalize_first": self.normalize_first,
            "dropout": self.dropout,
        }

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        parts = {key: configs.deserialize(config.get(key)) for key in _PARTS}
        return cls(**{**config, **parts})


_PARTS = ("moe", "feed_forward", "attention", "normalization")


def _build(layer, *shapes):
    if not layer.built:
        layer.build(*shapes)


def _copy(layer, name, **changes):
    """A layer of the same configuration with weights of its own."""
    return type(layer).from_config({**layer.get_config(), "name": name, **changes})
