"""Batches and optimizers of a user's own model, and its plan."""

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks, engine, functional, runtime
from keras_moe.planning.cluster import Cluster
from keras_moe.planning.model_plan import ModelPlan, make_plan
from keras_moe.planning.step_measures import share_of
from keras_moe.planning.traced.measures import measures_of
from keras_moe.planning.traced.step import said_of_batch

# So many experts at most are traced one by one, which takes half a minute. A device with
# a part of more of them is planned as one that has all.
_MOST_ONE_BY_ONE = 512


def plan_model(
    model: keras.Model,
    cluster: Cluster,
    *,
    num_devices: int | None,
    batch: Any,
    batch_size: int | None,
    sequence_length: int | None,
    optimizer: Any,
    expert_parallel_size: int | None,
    recompute: bool | None,
    imbalance: float,
) -> ModelPlan:
    """`keras_moe.planning.plan` of a model; see there.

    Raises:
        ValueError: The model is not built, or built under a strategy; its batch is not
            known; a number is out of range.
    """
    _verify_model(model)
    optimizer, make = _optimizer(model, optimizer)
    batch = _batch(model, batch, batch_size, sequence_length)
    devices = cluster.num_devices or 1
    devices = devices if num_devices is None else num_devices
    devices = checks.verify_positive_int(devices, "num_devices")
    if expert_parallel_size is not None:
        checks.verify_positive_int(expert_parallel_size, "expert_parallel_size")
    size = int(tf.nest.flatten(batch)[0].shape[0])

    def measured(batch_size, recompute, one_by_one):
        with (
            _recomputing(model, recompute),
            runtime.attribute(one_by_one, "computation", "unrolled"),
        ):
            return _measure(model, _resized(batch, batch_size), make)

    @functools.cache
    def planned(one_by_one):
        return measured(size, recompute, one_by_one)

    def remeasure(batch_size, group_size, again):
        one_by_one = _one_by_one(model, group_size)
        if again is None and batch_size == size:
            return planned(one_by_one)
        return measured(batch_size, recompute if again is None else again, one_by_one)

    return make_plan(
        name=model.name,
        cluster=cluster,
        num_devices=devices,
        batch_size=size,
        optimizer=optimizer,
        imbalance=imbalance,
        expert_parallel_size=expert_parallel_size,
        remeasure=remeasure,
    )


def _verify_model(model):
    if not model.built or not model.trainable_variables:
        raise ValueError(
            f"`model` must be built and have weights to train. Received: {model.name!r}, "
            f"built={model.built}, {len(model.trainable_variables)} trained weights. "
            "Call it on a batch first."
        )
    if any(engine.strategy_of(v) for v in model.variables):
        raise ValueError(
            f"`model` must be built outside of strategies. Received: {model.name!r}, "
            "whose weights devices share. Build it again without a scope; the plan "
            "shares them out."
        )


def _optimizer(model, optimizer):
    """Name of an optimizer's class and a function that makes such a one."""
    if optimizer is None:
        optimizer = getattr(model, "optimizer", None) if model.compiled else "adam"
    try:
        known = keras.optimizers.get(optimizer)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "`optimizer` must be a keras.optimizers.Optimizer or the name of one. "
            f'Received: optimizer={optimizer!r}. Pass "adam", say, or None for that of '
            "the compiled model."
        ) from error
    config = known.get_config()
    return type(known).__name__, lambda: type(known).from_config(config)


def _batch(model, batch, batch_size, sequence_length):
    """Specs of inputs and targets, `(x, y)` or `(x,)`."""
    for name, number in (
        ("batch_size", batch_size),
        ("sequence_length", sequence_length),
    ):
        if number is not None:
            checks.verify_positive_int(number, name)
    if batch is None:
        inputs = _inputs(model, batch_size, sequence_length)
        return (inputs, None) if model.compiled else (inputs,)
    whole = batch if isinstance(batch, tuple) else (batch,)
    specs = tf.nest.map_structure(_spec, whole)
    specs = tf.nest.map_structure(
        lambda spec: _filled(spec, batch_size, sequence_length), specs
    )
    if len(specs) == 1 and model.compiled:
        return (*specs, None)
    return specs if model.compiled else specs[:1]


def _spec(array):
    if isinstance(array, tf.TensorSpec):
        return array
    if isinstance(array, keras.KerasTensor):
        return tf.TensorSpec(array.shape, array.dtype)
    array = array if hasattr(array, "dtype") else np.asarray(array)
    return tf.TensorSpec(array.shape, tf.as_dtype(array.dtype))


def _inputs(model, batch_size, sequence_length):
    """Specs of what the model was built for."""
    inputs = getattr(model, "inputs", None)
    if inputs:
        structure = getattr(model, "_inputs_struct", None)
        if structure is None:
            structure = inputs
        if isinstance(structure, list) and len(structure) == 1:
            structure = structure[0]
        specs = tf.nest.map_structure(_spec, structure)
    else:
        shape = getattr(model, "_build_shapes_dict", None) or {}
        shape = next(iter(shape.values()), None) if len(shape) == 1 else None
        if not isinstance(shape, (tuple, list)) or not all(
            d is None or isinstance(d, int) for d in shape
        ):
            raise ValueError(
                "`batch` must be given for a model that does not tell its inputs. "
                f"Received: batch=None for {model.name!r}, a {type(model).__name__}. "
                "Pass an example batch, or specs, as batch=(x, y)."
            )
        reads_ids = any(
            isinstance(each, keras.layers.Embedding) for each in model._flatten_layers()
        )
        specs = tf.TensorSpec(shape, tf.int32 if reads_ids else keras.config.floatx())
    return tf.nest.map_structure(
        lambda spec: _filled(spec, batch_size, sequence_length), specs
    )


def _filled(spec, batch_size, sequence_length):
    """A spec of which every axis is known."""
    shape = list(spec.shape)
    if shape and shape[0] is None:
        shape[0] = batch_size
    shape = [sequence_length if d is None and i else d for i, d in enumerate(shape)]
    if None in shape:
        name = "batch_size" if shape[0] is None else "sequence_length"
        raise ValueError(
            f"`{name}` must be given: the model takes any. Received: {name}=None for "
            f"inputs of {tuple(spec.shape)}. Pass a number, or an example batch as "
            "batch=(x, y)."
        )
    if batch_size is not None:
        shape[:1] = [batch_size] * bool(shape)
    return tf.TensorSpec(shape, spec.dtype)


def _resized(batch, size):
    def resized(spec):
        return (
            tf.TensorSpec([size, *spec.shape[1:]], spec.dtype) if spec.shape else spec
        )

    return tf.nest.map_structure(lambda s: s if s is None else resized(s), batch)


def _measure(model, batch, make):
    if len(batch) < 2 or batch[1] is not None:
        return measures_of(model, batch, make())
    outputs = _outputs(model, batch[0])
    kinds = [_classes, _numbers] if _wants_classes(model) else [_numbers, _classes]
    first = None
    for kind in kinds:
        targets = tf.nest.map_structure(kind, outputs)
        try:
            return measures_of(model, (batch[0], targets), make())
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def _outputs(model, inputs):
    forward = tf.function(lambda x: model(x, training=True), autograph=False)
    with said_of_batch(model, inputs):
        outputs = forward.get_concrete_function(inputs).structured_outputs
    return tf.nest.map_structure(_spec, outputs)


def _classes(output):
    return tf.TensorSpec(output.shape[:-1], tf.int32)


def _numbers(output):
    return output


def _wants_classes(model):
    """Whether a loss takes numbers of classes, as far as its name tells."""
    losses = tf.nest.flatten(getattr(model, "loss", None))
    names = [each if isinstance(each, str) else type(each).__name__ for each in losses]
    names += [getattr(each, "__name__", "") for each in losses]
    return any("sparse" in n.lower() or n == "TokenCrossentropy" for n in names)


def _recomputing(model, recompute):
    """Experts compute hidden activations again, or not; None leaves them."""
    experts = [
        layer
        for layer in model._flatten_layers()
        if recompute is not None and hasattr(layer, "stacked_weights")
    ]
    return runtime.attribute(experts, "recompute", recompute)


def _one_by_one(model, group_size):
    """Experts that a device of a group computes one by one, and one device all at once.

    How experts are computed goes by how many of them a device has, if nobody says.
    """
    share = share_of(group_size)

    def is_one(layer):
        if getattr(layer, "computation", "") is not None:
            return False
        number, together = layer.num_experts, getattr(layer, "group_size", 1)
        here = round(number * share(number, together))
        ways = [functional.default_computation(n) for n in (number, here)]
        return ways == ["blocks", "unrolled"] and number <= _MOST_ONE_BY_ONE

    return tuple(filter(is_one, model._flatten_layers()))
