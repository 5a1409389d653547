"""SavedModels that load with TensorFlow alone."""

import os
import shutil
import tempfile
from pathlib import Path

import keras
import tensorflow as tf

from keras_moe import checks
from keras_moe.models.language_model import MoELanguageModel
from keras_moe.models.translation import MoETranslator
from keras_moe.serving.translate import translation_signatures

# Id of `<eos>` in every vocabulary of `keras_moe.data`.
_EOS = 2


def export(
    model: keras.Model, directory: str | os.PathLike, *, version: int | None = None
) -> Path:
    """Writes `<directory>/<version>/`, a SavedModel for inference.

    The functions run without noise, dropout or variable writes, with any batch
    size and length, and need nothing but TensorFlow to load. Every weight is
    written once. The folder appears under its name only when it is complete.

    Args:
        model: A built Keras model, functional, Sequential, `MoELanguageModel` or
            `MoETranslator`.
        directory: Folder of all versions of the model.
        version: Int. Name of the new folder. None takes the number after the
            largest there is. Defaults to `None`.

    Returns:
        Path of the new folder. `serving_default` takes the model's inputs and
        returns `{"outputs": ...}` (a dict output keeps its names). For a
        language model `inputs` are token ids `(batch, time)` and `outputs`
        logits; a second signature `score` returns `token_log_probs`
        `(batch, time)`, `log_prob` `(batch,)` and `perplexity` `(batch,)`,
        where the first token follows an end of sentence and padding (id 0)
        counts nothing. For a translation model see
        `keras_moe.serving.translate.translation_signatures`.

    Raises:
        ValueError: The model is not built or its inputs are not known, the
            version is not positive, or its folder exists already.
    """
    directory = Path(directory)
    if version is None:
        taken = [int(p.name) for p in directory.glob("*") if p.name.isdigit()]
        version = max(taken, default=0) + 1
    version = checks.verify_positive_int(version, "version")
    target = directory / str(version)
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
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    signatures = _signatures(model)
    directory.mkdir(parents=True, exist_ok=True)
    # A folder whose name is no number is invisible to a server that watches.
    partial = tempfile.mkdtemp(prefix=f".{version}-", dir=directory)
    try:
        tf.saved_model.save(module, partial, signatures=signatures)
        os.chmod(partial, 0o755)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _signatures(model):
    if isinstance(model, MoELanguageModel):
        return _language_model_signatures(model)
    if isinstance(model, MoETranslator):
        return translation_signatures(model)
    if not getattr(model, "inputs", None):
        raise ValueError(
            "`model` must know its inputs. Received: a subclassed model "
            f"{model.name!r}. Build it with `keras.Input` (functional or Sequential)."
        )
    specs = [
        tf.TensorSpec((None, *tensor.shape[1:]), tensor.dtype, tensor.name)
        for tensor in model.inputs
    ]

    @tf.function(input_signature=specs, autograph=False)
    def serving_default(*inputs):
        # The loader checks the type of what it is fed, but not the shape.
        checked = [
            tf.ensure_shape(value, spec.shape)
            for value, spec in zip(inputs, specs, strict=True)
        ]
        # A functional model takes its inputs as a flat list too.
        outputs = model(checked[0] if len(checked) == 1 else checked, training=False)
        return outputs if isinstance(outputs, dict) else {"outputs": outputs}

    return {"serving_default": serving_default}


def _language_model_signatures(model):
    spec = tf.TensorSpec((None, None), tf.int32, "inputs")

    def logits_of(tokens):
        tokens = tf.ensure_shape(tokens, spec.shape)  # the loader checks types only
        return model.call_with_state(tokens, model.initial_state(tf.shape(tokens)[0]))[
            0
        ]

    @tf.function(input_signature=[spec], autograph=False)
    def serving_default(inputs):
        return {"outputs": logits_of(inputs)}

    @tf.function(input_signature=[spec], autograph=False)
    def score(inputs):
        before = tf.pad(inputs[:, :-1], [[0, 0], [1, 0]], constant_values=_EOS)
        # Padding comes last; what follows it is never scored.
        log_probs = -tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels=inputs, logits=logits_of(before)
        )
        real = tf.cast(tf.not_equal(inputs, 0), log_probs.dtype)
        log_probs *= real
        total = tf.reduce_sum(log_probs, axis=1)
        count = tf.reduce_sum(real, axis=1)
        return {
            "token_log_probs": log_probs,
            "log_prob": total,
            "perplexity": tf.exp(-tf.math.divide_no_nan(total, count)),
        }

    return {"serving_default": serving_default, "score": score}
