"""Self- and cross-attention with rotary positions and a cache for decoding."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.layers import masks


@keras.saving.register_keras_serializable(package="keras_moe")
class CachedAttention(checks.FromConfig, keras.layers.Layer):
    """Multi-head attention that can turn its keys and keep them.

    $\\mathrm{concat}_n(\\mathrm{softmax}(q_n K_n^T / \\sqrt{H}) V_n) W$ over the heads n.
    With the same weights it computes what `keras.layers.MultiHeadAttention` does, or
    `keras.layers.GroupQueryAttention` where heads share keys; its weights have their
    names, shapes and order. Between the projections and the product, where those two
    let nobody in, it turns queries and keys by their positions, and reads and writes a
    cache.

    Args:
        num_heads: Int. Number of query heads.
        num_key_value_heads: Int or None. Heads of keys and values, a divisor of
            `num_heads`: 1 is multi-query attention. None means `num_heads`. Defaults to
            `None`.
        head_dim: Int or None. Features of a head. None means those of the query divided
            by `num_heads`. Defaults to `None`.
        max_wavelength: Float or None. With a number, rotary positions of that base, see
            `functional.rotary_embedding`; 10000 is usual. None turns nothing. Defaults
            to `None`.
        use_bias: Bool. Whether the projections have biases. Defaults to `True`.
        kernel_initializer: Initial value of the kernels. Defaults to
            `"glorot_uniform"`.

    Call arguments:
        query: Float tensor `(batch, target, features)`.
        value: Float tensor `(batch, source, value features)`, from which keys come too.
            None means `query`: self-attention.
        attention_mask: Bool tensor that broadcasts to `(batch, target, source)`, or
            None. True where a position may be attended to.
        cache: Tensor `(batch, 2, length, num_key_value_heads, head_dim)` of keys and
            values, or None, see `initial_cache`. The source is then what it holds.
        cache_update_index: Int, or int tensor `()` or `(batch,)`. Where in the cache
            the keys and values of `value` are written first. None: nothing is, `value`
            is not looked at, and the cache is the source.

    Input shape:
        `(batch, target, features)`, and likewise the value.

    Output shape:
        That of `query`; with `cache` a tuple of it and the cache to go on with.

    Losses and state:
        Weights of the four projections. No losses, no carried state.

    Raises:
        ValueError: A size is not positive; `num_heads` is no multiple of
            `num_key_value_heads`, or does not divide the features; `head_dim` is odd
            with rotary positions; inputs are not floating point of rank 3.

    Masks: none is taken from Keras: give `attention_mask`. Where a query may attend to
    nothing, its output is the bias.

    Mixed precision: softmax and angles are float32 at least.

    Example:

    >>> attention = keras_moe.layers.CachedAttention(4, 2, max_wavelength=10000.0)
    >>> attention(np.ones((2, 5, 16), "float32")).shape.as_list()
    [2, 5, 16]

    Reference:
        Vaswani et al. 2017, section 3.2; Ainslie et al. 2023, "GQA"; Su et al. 2021,
        "RoFormer". The call with a cache is that of keras_hub's CachedMultiHeadAttention.
    """

    def __init__(
        self,
        num_heads: int,
        num_key_value_heads: int | None = None,
        *,
        head_dim: int | None = None,
        max_wavelength: float | None = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_heads = checks.verify_positive_int(num_heads, "num_heads")
        if num_key_value_heads is not None:
            num_key_value_heads = checks.verify_positive_int(
                num_key_value_heads, "num_key_value_heads"
            )
            if self.num_heads % num_key_value_heads:
                raise ValueError(
                    "`num_key_value_heads` must divide `num_heads`. Received: "
                    f"num_key_value_heads={num_key_value_heads}, num_heads={num_heads}. "
                    "Each of them serves as many query heads."
                )
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = (
            None
            if head_dim is None
            else checks.verify_positive_int(head_dim, "head_dim")
        )
        self.max_wavelength = (
            None
            if max_wavelength is None
            else checks.verify_number(max_wavelength, "max_wavelength", "(0, inf)")
        )
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, query_shape, value_shape=None):
        engine.note_layer()
        name = type(self).__name__
        features = checks.verify_input_shape(query_shape, name)
        value_shape = query_shape if value_shape is None else value_shape
        checks.verify_input_shape(value_shape, name)
        for shape in (query_shape, value_shape):
            if len(shape) != 3:
                raise ValueError(
                    f"`inputs` of {name} must be (batch, time, features). Received: "
                    f"shape={tuple(shape)}. Reshape them."
                )
        self._head_dim = self._features_of_head(features)
        num_groups = self.num_key_value_heads or self.num_heads
        self.query_dense = self._projection("query", self.num_heads)
        self.key_dense = self._projection("key", num_groups)
        self.value_dense = self._projection("value", num_groups)
        self.output_dense = keras.layers.EinsumDense(
            "btnh,nhd->btd",
            output_shape=(None, features),
            bias_axes="d" if self.use_bias else None,
            name="attention_output",
            **self._options(),
        )
        self.query_dense.build(query_shape)
        self.key_dense.build(value_shape)
        self.value_dense.build(value_shape)
        self.output_dense.build((None, None, self.num_heads, self._head_dim))

    def _features_of_head(self, features):
        if self.head_dim is None and features % self.num_heads:
            raise ValueError(
                "`num_heads` must divide the features. Received: "
                f"num_heads={self.num_heads}, features={features}. Choose another "
                "number, or give `head_dim`."
            )
        head_dim = self.head_dim or features // self.num_heads
        if self.max_wavelength is not None and head_dim % 2:
            raise ValueError(
                "`head_dim` must be even with rotary positions, which turn features in "
                f"pairs. Received: head_dim={head_dim}. Give an even `head_dim`."
            )
        return head_dim

    def _projection(self, name, num_heads):
        return keras.layers.EinsumDense(
            "btd,dnh->btnh",
            output_shape=(None, num_heads, self._head_dim),
            bias_axes="nh" if self.use_bias else None,
            name=name,
            **self._options(),
        )

    def _options(self):
        # A copy for every kernel, as in Keras' attention: one object gives equal values.
        copy = type(self.kernel_initializer).from_config(
            self.kernel_initializer.get_config()
        )
        return {"kernel_initializer": copy, "dtype": self.dtype_policy}

    def call(
        self,
        query,
        value=None,
        attention_mask=None,
        cache=None,
        cache_update_index=None,
    ):
        checks.verify_floating(query.dtype, type(self).__name__)
        value = query if value is None else value
        start = 0 if cache is None else cache_update_index
        queries = self._turned(self.query_dense(query), start)
        if cache is None:
            keys, values = (
                self._turned(self.key_dense(value), 0),
                self.value_dense(value),
            )
        else:
            if cache_update_index is not None:
                keys = self._turned(self.key_dense(value), start)
                new = tf.stack([keys, self.value_dense(value)], axis=1)
                cache = _written(cache, new, cache_update_index)
            keys, values = tf.unstack(cache, axis=1)
        attention_mask = masks.of_pairs(attention_mask, query, keys)
        attended = functional.dot_product_attention(
            queries, keys, values, attention_mask
        )
        outputs = self.output_dense(attended)
        return outputs if cache is None else (outputs, cache)

    def _turned(self, x, start):
        """`(batch, time, heads, head_dim)` at positions from `start` on."""
        if self.max_wavelength is None:
            return x
        if start is None:
            raise ValueError(
                "`cache_update_index` must be given with rotary positions: it says where "
                "the query stands. Received: cache_update_index=None, "
                f"max_wavelength={self.max_wavelength}. For cross attention leave "
                "`max_wavelength` out."
            )
        positions = masks.positions_from(start, tf.shape(x)[1])
        return functional.rotary_embedding(x, positions, self.max_wavelength)

    def initial_cache(self, batch_size: Any, length: Any) -> tf.Tensor:
        """An empty cache.

        Args:
            batch_size: Int or scalar int tensor.
            length: Int or scalar int tensor. Positions that it has room for.

        Returns:
            Zeros `(batch_size, 2, length, num_key_value_heads, head_dim)` in the compute
            type.
        """
        self._verify_built("initial_cache")
        groups = self.num_key_value_heads or self.num_heads
        shape = (batch_size, 2, length, groups, self._head_dim)
        return tf.zeros(shape, self.compute_dtype)

    def cache_of(self, value) -> tf.Tensor:
        """Keys and values of a whole source, for cross attention.

        Args:
            value: Float tensor `(batch, source, value features)`.

        Returns:
            A cache of `source` positions.
        """
        self._verify_built("cache_of")
        keys = self._turned(self.key_dense(value), 0)
        return tf.stack([keys, self.value_dense(value)], axis=1)

    def _verify_built(self, method):
        if not self.built:
            raise ValueError(
                f"`{method}` needs the sizes of the inputs. Received: {self.name!r}, not "
                "built. Call the layer, or its `build`, before."
            )

    def compute_output_shape(self, query_shape, value_shape=None, cache_shape=None):
        return query_shape if cache_shape is None else (query_shape, cache_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_wavelength": self.max_wavelength,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def _written(cache, new, index):
    """A cache with `new` `(batch, 2, T, ...)` from position `index` of each row on.

    By selection, not by scattering: static shapes, rows with starts of their own, and
    nothing outside of the cache is written.
    """
    time = tf.shape(new)[2]
    start = tf.reshape(tf.cast(index, tf.int32), [-1, 1])
    # Which of the new steps belongs to each position, (1 or batch, length).
    step = tf.range(tf.shape(cache)[2]) - start
    inside = (step >= 0) & (step < time)
    step = tf.broadcast_to(
        tf.clip_by_value(step, 0, time - 1), [tf.shape(cache)[0], tf.shape(cache)[2]]
    )
    by_position = tf.transpose(new, [0, 2, 1, 3, 4])
    picked = tf.gather(by_position, step, batch_dims=1)
    picked = tf.transpose(picked, [0, 2, 1, 3, 4])
    return tf.where(inside[:, tf.newaxis, :, tf.newaxis, tf.newaxis], picked, cache)
