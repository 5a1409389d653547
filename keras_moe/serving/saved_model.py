"""SavedModels that load with TensorFlow alone."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks
from keras_moe.data import Vocabulary
from keras_moe.serving.one_device import one_device_copy
from keras_moe.serving.signatures import signatures_of
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
) -> Path:
    """Writes `<directory>/<version>/`, a SavedModel for TensorFlow Serving.

    The functions run without noise, dropout or variable writes, with any batch
    size and length, and need nothing but TensorFlow to load (and the operations
    of TensorFlow Text where `text` is given, which the stock server has). The
    answer to a row does not depend on the rows that share its batch, nor on
    padding. Every weight is written once. The folder appears under its name only
    when it is complete.

    Every model has `serving_default`, from its own inputs to `outputs` (a dict
    output keeps its names), and `routing` if there are `MoE` layers in it: for
    each of them `<name>_experts` and `<name>_gates`, int32 and float of shape
    `(batch, ..., k)`, with -1 and 0 where a token has no (more) experts.

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
        model: A built Keras model: functional, Sequential, `MoELanguageModel` or
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
    model, writes = one_device_copy(model)
    if not writes:
        return target
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    if text is not None:
        module.table = text.table
    with _without_cudnn(model):
        functions = _choose(signatures_of(model, text), signatures)
        concrete = {name: f.get_concrete_function() for name, f in functions.items()}
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


def _choose(available, names):
    if names is None:
        return available
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in available]
    if unknown or not names:
        raise ValueError(
            f"`signatures` must be names of {sorted(available)}. Received: {names}."
        )
    return {name: available[name] for name in names}


@contextlib.contextmanager
def _without_cudnn(model: keras.Model) -> Iterator[None]:
    """Keeps Keras from tracing cuDNN, which no CPU server can run."""
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "use_cudnn")]
    before = [layer.use_cudnn for layer in layers]
    for layer in layers:
        layer.use_cudnn = False
    try:
        yield
    finally:
        for layer, use_cudnn in zip(layers, before, strict=True):
            layer.use_cudnn = use_cudnn
