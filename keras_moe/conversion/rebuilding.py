"""A copy of a model in which some layers are others."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def rebuild(
    model: Any,
    replacements: Mapping[int, keras.layers.Layer],
    left_out: Iterable[int] = (),
    inputs: Any = None,
) -> Any:
    """A new model, the weights of whose other layers are copies.

    Graphs of layers (`Sequential`, functional) are built again, without the layers
    that are left out. Any other layer or model is made again by its `get_config`, and
    its attributes that hold a layer, or a list or dict of layers, are set anew.

    Args:
        model: A built model or layer.
        replacements: By the `id` of a layer what stands in its place, built.
        left_out: `id`s of layers that pass on their input.
        inputs: Specs of the inputs of a subclassed model. Defaults to `None`.

    Returns:
        A model of the same structure, not compiled.

    Raises:
        ValueError: A layer around a replaced one cannot be made from its config, or
            holds it where it cannot be reached.
    """
    return _Copier(replacements, left_out).run(model, inputs)


def array_of(variable: Any) -> np.ndarray:
    """The value of a variable or tensor."""
    # By `numpy()`: the way through `__array__`, also Keras' own, is deprecated in NumPy 2.
    return tf.convert_to_tensor(variable).numpy()


def verify_specs(inputs: Any) -> None:
    """Raises a `ValueError` unless all of a structure has a shape and a dtype."""
    for spec in keras.tree.flatten(inputs):
        if not (hasattr(spec, "shape") and hasattr(spec, "dtype")):
            raise ValueError(
                "`inputs` must be specs of the model's inputs, anything with a shape "
                f"and a dtype. Received: {spec!r}. Pass for example "
                "keras.Input((None,), dtype='int32')."
            )


def copy_weights(layer: Any, copy: Any) -> None:
    """Gives a layer the weights of another, and says of the same that they train.

    Args:
        layer: The other, built.
        copy: Made of its config, built here if it is not.

    Raises:
        ValueError: Its config makes another layer.
    """
    if layer.built and not copy.built:
        copy.build_from_config(layer.get_build_config())
    own, copied = _variables(layer), _variables(copy)
    if [v.shape for v in own] != [v.shape for v in copied]:
        raise ValueError(
            f"`model` must be made of layers whose config says what they are. "
            f"Received: {layer.name!r}, a {type(layer).__name__} with weights "
            f"{[tuple(v.shape) for v in own]}, of whose config one with "
            f"{[tuple(v.shape) for v in copied]} is made. Complete its `get_config`."
        )
    for value, variable in zip(own, copied, strict=True):
        variable.assign(value)
    inner, inner_copies = layer._flatten_layers(), copy._flatten_layers()
    for one, other in zip(inner, inner_copies, strict=True):
        if one.trainable != other.trainable:
            other.trainable = one.trainable


def is_graph(layer: Any) -> bool:
    """Whether a model is functional."""
    return hasattr(layer, "operations")


class _Copier:
    def __init__(self, replacements, left_out):
        self.replacements = dict(replacements)
        self.left_out = set(left_out)
        self._copies: dict[int, Any] = {}
        self._open: list[tuple[Any, Any]] = []  # weights are still to be copied

    def run(self, model, inputs):
        copy = self.copy(model)
        if not copy.built:
            if inputs is not None:
                copy(keras.tree.map_structure(_symbolic, inputs))
            else:
                copy.build_from_config(model.get_build_config())
        while self._open:
            self._fill(*self._open.pop())
        return copy

    def copy(self, layer):
        """The layer that stands for one of before, the same for every use of it."""
        if id(layer) not in self._copies:
            self._copies[id(layer)] = self._make(layer)
        return self._copies[id(layer)]

    def _make(self, layer):
        if id(layer) in self.replacements:
            return self.replacements[id(layer)]
        if id(layer) in self.left_out:
            # What it is outside of graphs: `call` takes `training` and drops nothing.
            return keras.layers.Dropout(0.0, name=layer.name)
        if self._is_rebuilt(layer):
            sequential = isinstance(layer, keras.Sequential)
            copy = self._sequence(layer) if sequential else self._graph(layer)
            if not layer.trainable:
                copy.trainable = False
            return copy
        copy = _from_config(layer)
        if isinstance(layer, keras.layers.Layer):
            self._open.append((layer, copy))
        return copy

    def _is_rebuilt(self, layer):
        """Whether a model is built again of copies of its layers."""
        if isinstance(layer, keras.Sequential):
            return type(layer).__init__ is keras.Sequential.__init__
        if not is_graph(layer):
            return False
        # A class of its own keeps that, if the graph itself stays as it is.
        return _takes_graph(type(layer)) or any(
            self._is_changed(operation) for operation in layer.operations
        )

    def _is_changed(self, layer):
        """Whether its own place in a graph is taken by another layer."""
        if id(layer) in self.replacements or id(layer) in self.left_out:
            return True
        return (
            isinstance(layer, keras.Model)
            and self._touches(layer)
            and self._is_rebuilt(layer)
        )

    def _touches(self, layer):
        changed = self.replacements.keys() | self.left_out
        return any(id(inner) in changed for inner in layer._flatten_layers())

    def _sequence(self, model):
        layers = [self.copy(x) for x in model.layers if id(x) not in self.left_out]
        (tensor,) = model.inputs
        start = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype)
        return type(model)([start, *layers], name=model.name)

    def _graph(self, model):
        # Of the same tensors, but without optimizer and losses.
        kind = type(model) if _takes_graph(type(model)) else keras.Model
        plain = kind(model.input, model.output, name=model.name)
        passing: set[int] = set()

        def clone(operation):
            copy = self.copy(operation)
            if id(operation) in self.left_out:
                passing.add(id(copy))
            return copy

        def call(operation, *args, **kwargs):
            if id(operation) in passing:
                return args[0] if args else next(iter(kwargs.values()))
            return operation(*args, **kwargs)

        # Keras itself would call inputs after their tensors.
        layers = [x for x in model.operations if isinstance(x, keras.layers.InputLayer)]
        starts = {id(x.output): _from_config(x).output for x in layers}
        return keras.models.clone_model(
            plain,
            keras.tree.map_structure(lambda tensor: starts[id(tensor)], plain.input),
            clone_function=clone,
            call_function=call,
        )

    def _fill(self, layer, copy):
        """Copies weights, then puts in place what stands inside a layer."""
        copy_weights(layer, copy)
        if self._touches(layer):
            self._replace_inside(layer, copy)

    def _replace_inside(self, layer, copy):
        changed: dict[int, Any] = {}
        removed = []
        both = list(zip(_inner(layer), _inner(copy), strict=True))
        for one, other in both:
            if not self._touches(one):
                continue
            own = id(one) in self.replacements or id(one) in self.left_out
            if own or self._is_rebuilt(one):
                changed[id(one)] = self.copy(one)
            else:
                self._replace_inside(one, other)
                continue
            removed.append(other)
        held = {}
        for name, value in vars(layer).items():
            if name != "_layers" and not name.startswith("_self_"):
                new_value = _replaced(value, getattr(copy, name, None), changed)
                if new_value is not None:
                    held[name] = new_value
        reached = {id(x) for value in held.values() for x in keras.tree.flatten(value)}
        for one in _inner(layer):
            if id(one) in changed and id(changed[id(one)]) not in reached:
                raise ValueError(
                    "`model` must hold a layer that is replaced as an attribute, or in "
                    f"a list or dict that is one. Received: {one.name!r} inside of "
                    f"{layer.name!r}, a {type(layer).__name__}. Leave it out of "
                    "`layers`."
                )
        # Keras takes no new layers into one that is built.
        locked = copy._tracker.locked
        copy._tracker.unlock()
        for name, value in held.items():
            setattr(copy, name, value)
        for other in removed:
            copy._tracker.untrack(other)
        # In the order of before, in which a further copy compares the weights.
        for one, other in both:
            own = changed.get(id(one), other)
            copy._tracker.untrack(own)
            copy._tracker.track(own)
        if locked:
            copy._tracker.lock()


def _replaced(value, copied, changed):
    """An attribute of the copy with other layers in it; None if it stays."""
    if isinstance(value, keras.layers.Layer):
        return changed.get(id(value))
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list) or type(value) is tuple:
        keys = list(range(len(value)))
    else:
        return None
    if type(copied) is not type(value) or len(copied) != len(value):
        return None  # of Keras itself: notes on how a layer was called
    new = {key: _replaced(value[key], copied[key], changed) for key in keys}
    if all(each is None for each in new.values()):
        return None
    new = {key: copied[key] if each is None else each for key, each in new.items()}
    if isinstance(value, dict):
        return new
    return tuple(new.values()) if type(value) is tuple else list(new.values())


def _inner(layer):
    return layer._flatten_layers(recursive=False, include_self=False)


def _variables(layer):
    """Weights and states of generators, without those of metrics."""
    metrics = {
        id(variable)
        for inner in layer._flatten_layers()
        for metric in getattr(inner, "_metrics", ())
        for variable in metric.variables
    }
    return [variable for variable in layer.variables if id(variable) not in metrics]


def _takes_graph(kind):
    """Whether a class of functional models is made of inputs and outputs."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    any_kind = {parameter.kind for parameter in parameters}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= any_kind:
        return True
    return [parameter.name for parameter in parameters[:2]] == ["inputs", "outputs"]


def _from_config(layer):
    try:
        return type(layer).from_config(layer.get_config())
    except Exception as error:
        raise ValueError(
            "`model` must be made of layers that a config brings back. Received: "
            f"{layer.name!r}, a {type(layer).__name__}, which its `from_config` does "
            f"not make of its `get_config`: {error} Give it both."
        ) from error


def _symbolic(spec):
    shape = [axis if isinstance(axis, int) else None for axis in spec.shape]
    dtype = keras.backend.standardize_dtype(tf.as_dtype(spec.dtype).name)
    return keras.KerasTensor(shape, dtype)
