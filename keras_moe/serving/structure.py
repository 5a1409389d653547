"""What a model takes and gives, as the flat names of a signature."""

import inspect
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class CallArguments(NamedTuple):
    """The arguments of a model's call, however they are nested.

    Attributes:
        specs: `tf.TensorSpec` of every tensor, with different names.
        structure: A list of the arguments, in which the tensors stand.
        names: Names of the arguments; None where they go by position.
    """

    specs: list[tf.TensorSpec]
    structure: list
    names: Sequence[str] | None = None

    def call(self, model: keras.Model, tensors: Sequence[tf.Tensor]) -> Any:
        """The outputs of a model for tensors in the order of `specs`."""
        given = keras.tree.pack_sequence_as(self.structure, list(tensors))
        if self.names is None:
            return model(*given, training=False)
        named = dict(zip(self.names, given, strict=True))
        return model(**named, training=False)


def call_arguments(model: keras.Model, input_signature: Any = None) -> CallArguments:
    """The arguments that a model is exported with, those of `keras.Model.export`.

    Args:
        model: A built Keras model.
        input_signature: A list with one structure of specs for each argument, or a
            structure for the first. None takes what the model was built with.

    Returns:
        `CallArguments`. An input is called what its `keras.Input` or spec is; without
        such a name what its argument is, with its keys or places in that. Characters
        other than letters and digits become `_`.

    Raises:
        ValueError: The inputs are not known, or `input_signature` holds something
            that has no shape and dtype.
    """
    parameters = _parameters(model)
    names = None
    if input_signature is not None:
        one_each = isinstance(input_signature, (list, tuple))
        structure = list(input_signature) if one_each else [input_signature]
    elif (inputs := getattr(model, "_inputs_struct", None)) is not None:
        structure = [inputs]
    elif inputs := getattr(model, "inputs", None):  # Sequential
        structure = [inputs[0]]
    else:
        shapes = model._build_shapes_dict if model._called else None
        if not shapes:
            raise ValueError(
                "`model` must know its inputs. Received: a subclassed model "
                f"{model.name!r} that was not called. Call it on a batch first, or "
                "pass `input_signature`."
            )
        structure = keras.tree.map_shape_structure(
            lambda shape: tf.TensorSpec((None, *shape[1:]), model.input_dtype),
            list(shapes.values()),
        )
        own = [key.removesuffix("_shape") for key in shapes]
        names = own if set(own) <= set(parameters) else None
    called = names or parameters
    found = []
    for (i, *path), leaf in _flatten_with_path(structure):
        argument = called[i] if i < len(called) else f"args_{i}"
        keys = [key for key in path if isinstance(key, str)]
        path = path if keys else [argument, *path]
        found.append((getattr(leaf, "name", None) or "_".join(map(str, path)), leaf))
    unique = unique_names(_identifier(name) for name, _ in found)
    specs = [_spec(leaf, name) for name, (_, leaf) in zip(unique, found, strict=True)]
    return CallArguments(specs, structure, names)


def named_outputs(model: keras.Model, outputs: Any) -> dict[str, tf.Tensor]:
    """The outputs of a model, however they are nested, by different names.

    Args:
        model: The model that gave them.
        outputs: A tensor, or a structure of them; None is left out.

    Returns:
        The only output as `outputs`. Those of a dict by their keys, others by the
        names of their layers as in `keras.Model.output_names`, or `output_0`, ...
        where those are not known. What is nested deeper has all keys and places in
        its name, joined by `_`.
    """
    leaves = _flatten_with_path(outputs)
    keyed = any(isinstance(key, str) for path, _ in leaves for key in path)
    names = getattr(model, "output_names", None) or ()
    if len(leaves) == 1 and not keyed:
        names = ["outputs"]
    elif keyed or len(names) != len(leaves):
        names = ["_".join(map(str, _from_a_name(path))) for path, _ in leaves]
    pairs = zip(unique_names(names), leaves, strict=True)
    return {name: leaf for name, (_, leaf) in pairs if leaf is not None}


def unique_names(names: Iterable[str]) -> list[str]:
    """The names, with a number at the end of those that came before."""
    names = list(names)
    taken = set(names)
    unique: list[str] = []
    for name in names:
        new, i = name, 0
        while new in unique or (i and new in taken):
            i += 1
            new = f"{name}_{i}"
        unique.append(new)
    return unique


def _flatten_with_path(structure):
    """What `keras.tree.flatten_with_path` gives, which older versions lack."""
    numbers = range(len(keras.tree.flatten(structure)))
    paths = {}

    def walk(part, path):
        if isinstance(part, int):
            paths[part] = path
            return
        pairs = part.items() if isinstance(part, Mapping) else enumerate(part)
        for key, child in pairs:
            walk(child, (*path, key))

    # Numbers in place of the leaves say in which order this Keras takes them.
    walk(keras.tree.pack_sequence_as(structure, list(numbers)), ())
    return [(paths[i], leaf) for i, leaf in enumerate(keras.tree.flatten(structure))]


def _from_a_name(path):
    return path if isinstance(path[0], str) else ("output", *path)


def _parameters(model):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.call).parameters.values()
    return [each.name for each in parameters if each.kind in kinds]


def _identifier(name):
    """What TensorFlow makes of a name for a function's argument, or could."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    right = name[:1].isalpha() and not keyword.iskeyword(name)
    return name if right else f"arg_{name}"


def _spec(leaf, name):
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(
            "`input_signature` must hold specs with a shape and a dtype. Received: "
            f"{leaf!r} for {name!r}. Pass `tf.TensorSpec` or `keras.InputSpec`."
        )
    if not isinstance(leaf, (tf.TensorSpec, keras.InputSpec)):
        shape = (None, *shape[1:])
    return tf.TensorSpec(shape, dtype, name)
