"""Checks of the parts of a transformer block."""

import inspect

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.layers.moe import MoE


def verify_attention(attention, num_key_value_heads, max_wavelength) -> int | None:
    """The heads of the attention that a block is to make, None if it is given one."""
    if not isinstance(attention, keras.layers.Layer):
        return checks.verify_positive_int(attention, "attention")
    if (num_key_value_heads, max_wavelength) != (None, None):
        raise ValueError(
            "`num_key_value_heads` and `max_wavelength` must be None where `attention` "
            f"is a layer, which has its own. Received: {num_key_value_heads}, "
            f"{max_wavelength}. Give them to the layer."
        )
    return None


def verify_mixture(moe, feed_forward):
    if isinstance(feed_forward, MoE):
        raise ValueError(
            "`feed_forward` must not be a mixture. Received: "
            f"feed_forward={feed_forward.name!r}, a {type(feed_forward).__name__}. Pass "
            "it as `moe`."
        )
    if moe is None:
        return
    if not isinstance(moe, MoE):
        raise ValueError(
            "`moe` must be a MoE or HierarchicalMoE. Received: "
            f"moe={moe!r}. Pass another network as `feed_forward`."
        )
    if feed_forward is not None:
        raise ValueError(
            "Of `moe` and `feed_forward` only one may be given. Received: "
            f"moe={moe.name!r}, feed_forward={feed_forward!r}. Leave one out."
        )


def verify_width(layer, features):
    width = layer.compute_output_shape((None, None, features))[-1]
    if width != features:
        raise ValueError(
            f"{layer.name!r} must give as many features as it takes, for the residual. "
            f"Received: {width} features of {features}. Leave out `output_units`."
        )


def verify_normalization(normalization):
    if normalization is not None and not isinstance(normalization, keras.layers.Layer):
        raise ValueError(
            "`normalization` must be a Keras layer or None. Received: normalization="
            f"{normalization!r}. Pass keras.layers.RMSNormalization(), for example."
        )


def verify_call(block, inputs, has_encoder):
    """Raises unless a built block takes such inputs, with an encoder or without."""
    name = type(block).__name__
    if inputs is not None:
        checks.verify_dense(inputs, name)
        checks.verify_floating(inputs.dtype, name)
    if not block.built:
        raise ValueError(
            f"{name} {block.name!r} must be built before it is used with a cache. "
            "Received: a layer without weights. Call it, or its `build`, first."
        )
    if has_encoder != block.has_encoder:
        raise ValueError(
            "`encoder_outputs` must be given always or never: there are weights for it "
            f"or there are none. Received: {has_encoder} in this call, "
            f"{block.has_encoder} when {block.name!r} was built. Use two blocks."
        )


def verify_has_cache(attention, method):
    """Raises unless an attention can do what a method of the block needs of it."""
    taken = inspect.signature(attention.call).parameters.values()
    takes_it = any(p.name == "cache" or p.kind is p.VAR_KEYWORD for p in taken)
    if takes_it and (method != "initial_cache" or hasattr(attention, method)):
        return
    other = "call the block with all positions at once"
    if takes_it:
        other = (
            'pass a `cache` of your own to `call_with_cache`: {"self": ...}, of what '
            "this attention takes"
        )
    raise ValueError(
        "`attention` must have a cache, as `CachedAttention` has. Received: "
        f"attention={attention!r}. Leave it out, or {other}."
    )


def verify_source(encoder_outputs, inputs):
    """Raises unless there is a sequence to attend to for each of the inputs."""
    if encoder_outputs is None:
        return
    shape = encoder_outputs.shape
    if len(shape) != 3 or _differ(shape[0], inputs.shape[0]):
        raise ValueError(
            "`encoder_outputs` must be (batch, source, features), a row for each of "
            f"`inputs`. Received: shape={tuple(shape)}, so {shape[0]} rows, and inputs "
            f"of {inputs.shape[0]} rows. Repeat or cut one of them."
        )


def verify_room(cache, inputs, index, mask):
    """Raises unless a cache has room for some positions, as far as sizes are known.

    Args:
        cache: By name, `"self"` among them, tensors `(batch, 2, length, ...)`.
        inputs: `(batch, time, features)`.
        index: Int, or int tensor `()` or `(batch,)`.
        mask: `(batch, time)` bool or None. Those marked False need no room.
    """
    rows, time = inputs.shape[:2]
    for name, kept in cache.items():
        if _differ(kept.shape[0], rows):
            raise ValueError(
                f"`cache` must have as many rows as `inputs`. Received: {name!r} in "
                f"`cache` of {kept.shape[0]} rows, inputs of {rows} rows. Make one for "
                "them by `initial_cache`."
            )
    if hasattr(index, "dtype") and not isinstance(index, np.ndarray | np.generic):
        index = tf.convert_to_tensor(index)  # of a variable what it holds
    index = checks.verify_ids(index, "index")
    if len(index.shape) > 1 or (index.shape != (1,) and _differ(_size(index), rows)):
        raise ValueError(
            "`index` must be one int, or one for each row of `inputs`. Received: "
            f"index.shape={tuple(index.shape)}, {rows} rows. Pass as many."
        )
    length = cache["self"].shape[2]
    if length is None:
        return
    too_many = time is not None and time > length
    if too_many or _leaves(index, length, time or 1, mask):
        known = not tf.is_symbolic_tensor(index)
        raise ValueError(
            "`index` and the positions from it on must be within the `length` of the "
            f"cache. Received: index={np.asarray(index) if known else index.name}, "
            f"length={length}, {time} positions. Give `initial_cache` a larger `length`."
        )


def _size(index):
    return index.shape[0] if len(index.shape) else None


def _leaves(index, length, time, mask):
    """Whether a position that counts, of known ones, is outside of a cache."""
    if any(tf.is_tensor(x) and tf.is_symbolic_tensor(x) for x in (index, mask)):
        return False
    positions = np.reshape(np.asarray(index), [-1, 1]) + np.arange(time)
    outside = (positions < 0) | (positions >= length)
    return bool(np.any(outside if mask is None else outside & np.asarray(mask)))


def _differ(a, b):
    return None not in (a, b) and a != b
