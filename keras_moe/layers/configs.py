"""Layers within layers, in configs and back."""

import uuid
import weakref
from collections.abc import Sequence
from typing import Any

import keras

# Which layers hold a layer, and how many times each.
_holders: Any = weakref.WeakKeyDictionary()
# Names of layers and their holders in configs, where Keras gives no name.
_names: Any = weakref.WeakKeyDictionary()
# By such a name the copy of a layer, and which holders have taken it.
_copies: Any = weakref.WeakValueDictionary()
_taken: Any = weakref.WeakKeyDictionary()


def hold(holder: Any, *layers: Any) -> None:
    """Notes that a layer holds others, which `serialize` will find to be shared.

    Args:
        holder: The layer or model.
        *layers: Layers, in the order of their use. Others are passed over.
    """
    for layer in layers:
        if isinstance(layer, keras.layers.Layer):
            counts = _holders.setdefault(layer, weakref.WeakKeyDictionary())
            counts[holder] = counts.get(holder, 0) + 1


def release(holder: Any, *layers: Any) -> None:
    """Takes `hold` back: the holder is part of another that holds them itself."""
    for layer in layers:
        _holders.get(layer, {}).pop(holder, None)


def serialize(holder: Any, layer: Any, index: int = 0) -> Any:
    """`keras.saving.serialize_keras_object`, of a layer that others may hold too.

    Keras marks a shared layer where it meets it again, and where it met it first.
    But the first mark is lost if a config around it was complete by then, as
    those of two mixtures are: so every layer is marked here. Where Keras marks
    nothing, in `get_config` and `clone_model`, only a shared one is.

    Args:
        holder: The layer or model whose `get_config` asks, after `hold`.
        layer: The layer, or None.
        index: Which of the holder's layers it is. Defaults to `0`.

    Returns:
        The config.
    """
    config = keras.saving.serialize_keras_object(layer)
    if layer is None:
        return None
    if _scope() is _scope():
        return {**config, "shared_object_id": id(layer)}
    if sum(_holders.get(layer, {}).values()) > 1:
        holder_name = f"{_name(holder)}/{index}"
        return {**config, "shared_object_id": _name(layer), "holder": holder_name}
    return config


def deserialize(
    config: Any, num_experts: Any = None, custom_objects: Any = None
) -> Any:
    """The layer of a config from `serialize`, shared as it was.

    A holder takes a copy once: when it asks again, that is another copy of the
    model, and all its holders get a new layer.

    Args:
        config: The config, or what is none, which is returned.
        num_experts: For a gate that takes it from its mixture: Keras would build
            it before the mixture is there. Defaults to `None`.
        custom_objects: As for `keras.saving`. Defaults to `None`.

    Returns:
        The layer.
    """
    if not isinstance(config, dict):
        return config
    config = dict(config)
    holder, name = config.pop("holder", None), config.get("shared_object_id")
    copy = _copies.get(name) if holder else None
    if copy is not None and holder not in _taken[copy]:
        _taken[copy].add(holder)
        return copy
    # Files of 0.1.0 name a shared layer from the second time on.
    unnamed, content = vars(_scope()).setdefault("layers", {}), repr(_unmarked(config))
    if name is not None and content in unnamed:
        return unnamed[content]
    build_config = None if num_experts is None else config.pop("build_config", None)
    layer = keras.saving.deserialize_keras_object(config, custom_objects)
    if num_experts is not None and getattr(layer, "num_experts", 0) is None:
        layer.num_experts = num_experts
    if build_config and not layer.built:
        layer.build_from_config(build_config)
        layer.built = True
    if holder:
        _copies[name], _taken[layer] = layer, {holder}
    elif name is None:
        unnamed[content] = layer
    return layer


def serialize_all(holder: Any, layers: Sequence) -> list:
    """`serialize` of each of a holder's layers."""
    return [serialize(holder, layer, index) for index, layer in enumerate(layers)]


def deserialize_all(config: Sequence | None, custom_objects: Any = None) -> list:
    """`deserialize` of each."""
    return [deserialize(each, None, custom_objects) for each in config or ()]


_PROBE = {
    **keras.saving.serialize_keras_object(keras.initializers.Zeros()),
    "shared_object_id": "keras_moe",
}


def _scope():
    """One object while a file is written or read, a new one at every other call."""
    return keras.saving.deserialize_keras_object(_PROBE)


def _name(layer):
    return _names.setdefault(layer, uuid.uuid4().hex)


def _unmarked(config):
    """A config without the names of shared layers, in an order of its own."""
    if isinstance(config, dict):
        items = config.items()
        return sorted((k, _unmarked(v)) for k, v in items if k != "shared_object_id")
    if isinstance(config, (list, tuple)):
        return [_unmarked(value) for value in config]
    return config
