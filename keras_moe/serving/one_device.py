"""The same model without a distribution strategy."""

import tempfile
from concurrent.futures import ThreadPoolExecutor

import keras
import tensorflow as tf

# Variables of a mirrored strategy, or on a mesh of DTensor.
_SEVERAL_DEVICES = (
    tf.distribute.DistributedValues,
    tf.experimental.dtensor.DVariable,
)


def one_device_copy(model: keras.Model) -> tuple[keras.Model, bool]:
    """A model whose variables are plain ones, as an export needs it.

    Args:
        model: A built Keras model, under a strategy or not. With several processes
            all of them must call this function.

    Returns:
        The model itself if it has no distributed variables, otherwise a copy of it
        with the same weights, outside of any strategy; and whether this process is
        the one that writes files.

    Raises:
        ValueError: The model is distributed and cannot be made again from its
            configuration.
    """
    values = [variable.value for variable in model.variables]
    if not any(isinstance(value, _SEVERAL_DEVICES) for value in values):
        return model, True
    weights = model.get_weights()  # of all processes
    if not _is_chief(model):
        return model, False
    # A thread of its own is in no scope, wherever this one is.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_copy, model, weights).result(), True


def _copy(model, weights):
    kind = type(model)
    try:
        copy = kind.from_config(model.get_config())
        if not copy.built:
            copy.build_from_config(model.get_build_config())
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            "`model` must have a `get_config` from which it can be made again, since "
            f"its variables are distributed. Received: {model.name!r}, a "
            f"{kind.__name__}. Add `get_config`, or load its weights into a model "
            f"that was built outside of the strategy. ({error})"
        ) from error
    copy.set_weights(weights)
    own_layers = zip(model._flatten_layers(), copy._flatten_layers(), strict=True)
    for layer, new in own_layers:
        _copy_adapted(layer, new)
    return copy


def _copy_adapted(layer, copy):
    """What `adapt` left in a layer beside its weights: a vocabulary, frequencies."""
    if not hasattr(layer, "adapt"):
        return
    store: dict = {}
    layer.save_own_variables(store)
    copy.load_own_variables(store)
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as directory:
            layer.save_assets(directory)
            copy.load_assets(directory)


def _is_chief(model):
    """Whether this process is the one of its cluster that writes."""
    resolver = getattr(model.distribute_strategy, "cluster_resolver", None)
    if resolver is None or not resolver.task_type:
        return True
    if resolver.task_type == "worker" and "chief" not in resolver.cluster_spec().jobs:
        return resolver.task_id == 0
    return resolver.task_type == "chief"
