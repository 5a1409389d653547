"""SavedModels that load with TensorFlow alone."""

import contextlib
import gc
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, runtime
from keras_moe.data import Vocabulary
from keras_moe.serving.one_device import one_device_copy
from keras_moe.serving.signature import UnseenRoutingError
from keras_moe.serving.signatures import has_own_signatures, signatures_of
from keras_moe.serving.structure import call_arguments
from keras_moe.serving.text import TextCodec
from keras_moe.serving.warmup import verify_warmup, write_warmup


def export(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    version: int | None = None,
    signatures: Sequence[str] | None = None,
    text: TextCodec | Vocabulary | None = None,
    warmup: Sequence[tuple[str, Mapping[str, Any]]] = (),
    input_signature: Any = None,
) -> Path:
    """Writes `<directory>/<version>/`, a SavedModel for TensorFlow Serving.

    The functions run without noise, dropout or variable writes, with any batch
    size and length, and need nothing but TensorFlow to load (and the operations
    of TensorFlow Text where `text` is given, which the stock server has). The
    answer to a row does not depend on the rows that share its batch, nor on
    padding. Every weight is written once. The folder appears under its name only
    when it is complete.

    Every model that `keras.Model.export` takes has `serving_default`, from its own
    inputs to its outputs, both by name. An input, in a list, a dict or deeper, is
    called what its `keras.Input` is (of a subclassed model: what its argument is,
    with its key or place in that). A single output is called `outputs`; those of a
    dict keep their keys, those of a list the names of their layers, and
    `output_0`, ... where these are not known; one that is nested deeper has all
    keys and places in its name, joined by `_`.

    A model with `MoE` layers has `routing` too: for each of them `<name>_experts`
    and `<name>_gates`, int32 and float of shape `(batch, ..., k)`, with -1 and 0
    where a token has no (more) experts. It is left out where the mixtures run in a
    loop or another function, into which it cannot look.

    A `MoELanguageModel` takes token ids `(batch, time)`, int32, as `inputs`,
    filled up with 0 at the end, and has two more. With `text` these and `routing`
    take strings `(batch,)` instead, called `text`, and also return `tokens`.

    - `score`: log probabilities (natural logarithms) `token_log_probs`
      `(batch, time)`, their sum `log_prob` `(batch,)`, `num_tokens` `(batch,)`
      and `perplexity` `(batch,)`. The first token follows the end of a sentence.
      Every line of a text ends with `<eos>`, which is scored too.
    - `generate`: continues `inputs` (with `text`: strings called `prompt`), each
      row by itself, with `temperature` (float32, 0 takes the most probable),
      `top_k` (int32, 0 means all), `max_new_tokens` (int32, 1 to 1,024) and
      `seed` (int64), all `(batch,)`. Returns the new `tokens`, and with `text`
      the strings `continuation` and `text`, which is prompt and continuation.
      Padding is never drawn, nor, with `text`, the unknown word. The same seed
      gives the same text.

    A model of a `tf.distribute` strategy, its experts sharded or not, gives the same
    SavedModel as one that was built without. With several processes all of them must
    call this function, since each holds some of the experts; the chief writes.

    A `MoETranslator` has `translate`, see
    `keras_moe.serving.translate.translation_signatures`.

    Args:
        model: A built Keras model: functional, Sequential, subclassed and called
            once, `MoELanguageModel`, `MoETransformerLanguageModel` or
            `MoETranslator`.
        directory: Folder of all versions of the model.
        version: Int. Name of the new folder. None takes the number after the
            largest there is. Defaults to `None`.
        signatures: Names of the signatures to write. None writes all that the
            model has. Defaults to `None`.
        text: `TextCodec`, or a `Vocabulary` for text that is split into words,
            for a language model. Defaults to `None`: token ids.
        warmup: Requests that a server runs before it takes others: pairs of a
            signature's name and its inputs by name. Each is run once before it
            is written. Defaults to `()`.
        input_signature: As in `keras.Model.export`: a list with one structure of
            `tf.TensorSpec` or `keras.InputSpec` for each argument of the call, for
            a subclassed model whose inputs are not floats, or to fix sizes. None
            takes the inputs that the model was built with. Defaults to `None`.

    Returns:
        Path of the new folder.

    Raises:
        ValueError: The model is not built, its inputs are not known, or it does
            not have one of `signatures`; `text` does not fit it; the version is
            not positive or its folder exists already; a request of `warmup`
            fails.
        ImportError: `text` without tensorflow-text, or `warmup` without
            tensorflow-serving-api.
    """
    directory = Path(directory)
    target = directory / str(_new_version(directory, version))
    if target.exists():
        raise ValueError(
            f"`version` must be new. Received: version={version}, but {target} "
            "exists. Leave `version` out to take the next number."
        )
    if not model.built:
        raise ValueError(
            f"`model` must be built. Received: {model.name!r}, which has no weights "
            "yet. Call it on a batch first."
        )
    if isinstance(text, Vocabulary):
        text = TextCodec(text)
    arguments = None
    if not has_own_signatures(model):
        arguments = call_arguments(model, input_signature)
    elif input_signature is not None:
        raise ValueError(
            "`input_signature` is for models without signatures of their own. "
            f"Received: a {type(model).__name__}. Leave `input_signature` out."
        )
    model, writes = one_device_copy(model)
    if not writes:
        return target
    with _without_cudnn(model), runtime.uncompiled_mixtures():
        concrete = _trace(signatures_of(model, text, arguments), signatures)
    module = tf.Module()
    module.weights, module.tables = _state(model, concrete.values())
    requests = verify_warmup(warmup, concrete)
    directory.mkdir(parents=True, exist_ok=True)
    # A folder whose name is no number is invisible to a server that watches.
    partial = tempfile.mkdtemp(prefix=f".{target.name}-", dir=directory)
    try:
        tf.saved_model.save(module, partial, signatures=concrete)
        if requests:
            write_warmup(partial, directory.resolve().name, requests)
        os.chmod(partial, 0o755)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _new_version(directory, version):
    if version is None:
        taken = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
        version = max(taken, default=0) + 1
    return checks.verify_positive_int(version, "version")


def _trace(available, names):
    """The functions that are asked for, traced; see `signatures` of `export`."""
    chosen = list(available) if names is None else names
    chosen = [chosen] if isinstance(chosen, str) else list(chosen)
    unknown = [name for name in chosen if name not in available]
    if unknown or not chosen:
        raise ValueError(
            f"`signatures` must be names of {sorted(available)}. Received: {chosen}."
        )
    concrete = {}
    for name in chosen:
        try:
            concrete[name] = available[name].get_concrete_function()
        except UnseenRoutingError:
            if names is not None:
                raise
    return concrete


def _state(model, functions):
    """The variables of a model, and the tables that its functions read.

    Both are found wherever the model keeps them, in lists and objects of its own
    too. A function knows its variables, but only the handles of its tables.
    """
    variables = [variable.value for variable in model.variables]
    variables += [v for function in functions for v in function.variables]
    captured = {id(c) for function in functions for c in function.captured_inputs}
    kind = tf.saved_model.experimental.TrackableResource
    tables = [each for each in gc.get_objects() if issubclass(type(each), kind)]
    return (
        list({id(variable): variable for variable in variables}.values()),
        [table for table in tables if captured & {id(v) for v in vars(table).values()}],
    )


def _without_cudnn(model: keras.Model) -> contextlib.AbstractContextManager[None]:
    """Keeps Keras from tracing cuDNN, which no CPU server can run."""
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "use_cudnn")]
    return runtime.attribute(layers, "use_cudnn", False)
