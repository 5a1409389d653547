"""Signatures of a language model: logits, scores, continuations, routing."""

from collections.abc import Callable

import tensorflow as tf

from keras_moe import functional
from keras_moe.data.vocabulary import EOS_ID, PAD_ID
from keras_moe.layers.routing_record import recorded_routing
from keras_moe.models.continuation import continue_tokens
from keras_moe.models.language_model import MoELanguageModel
from keras_moe.models.transformer import MoETransformerLanguageModel
from keras_moe.serving.signature import routing_outputs, signature
from keras_moe.serving.text import TextCodec
from keras_moe.types import at_least_float32

LanguageModel = MoELanguageModel | MoETransformerLanguageModel

# Rows of logits that are held at once: a long text needs little memory.
_ROWS_OF_LOGITS = 1024
MOST_NEW_TOKENS = 1024

_IDS = tf.TensorSpec((None, None), tf.int32, "inputs")
_TEXTS = tf.TensorSpec((None,), tf.string, "text")
_SETTINGS = [
    tf.TensorSpec((None,), tf.float32, "temperature"),
    tf.TensorSpec((None,), tf.int32, "top_k"),
    tf.TensorSpec((None,), tf.int32, "max_new_tokens"),
    tf.TensorSpec((None,), tf.int64, "seed"),
]


def language_model_signatures(
    model: LanguageModel, text: TextCodec | None
) -> dict[str, Callable]:
    """All signatures of a language model, by name; see `export`."""
    signatures = {
        "serving_default": _logits(model),
        "score": _score(model, text),
        "generate": _generate(model, text),
    }
    if model.moe_layers:
        signatures["routing"] = _routing(model, text)
    return signatures


def _logits(model):
    def call(ids):
        return {"outputs": model.softmax(_hidden(model, ids))}

    return signature([_IDS], call, "serving_default")


def _hidden(model, ids):
    """What the softmax is given, of texts from their beginning."""
    state = model._state_for(*tf.unstack(tf.shape(ids)))
    return model.hidden_with_state(ids, state)[0]


def _read(text):
    """The first input of a signature, and what makes it ids `(batch, time)`."""
    if text is None:
        return _IDS, tf.identity
    return _TEXTS, lambda texts: text.encode(texts).to_tensor()


def _score(model, text):
    spec, encode = _read(text)

    def call(given):
        ids = encode(given)
        before = tf.pad(ids[:, :-1], [[0, 0], [1, 0]], constant_values=EOS_ID)
        # Padding comes last; what follows it is never scored.
        log_probs = _log_probs(model, _hidden(model, before), ids)
        real = tf.cast(tf.not_equal(ids, PAD_ID), log_probs.dtype)
        log_probs *= real
        total = tf.reduce_sum(log_probs, axis=1)
        count = tf.reduce_sum(real, axis=1)
        answer = {
            "token_log_probs": log_probs,
            "log_prob": total,
            "num_tokens": tf.cast(count, tf.int32),
            "perplexity": tf.exp(-tf.math.divide_no_nan(total, count)),
        }
        return answer if text is None else {"tokens": text.tokens(ids), **answer}

    return signature([spec], call, "score")


def _log_probs(model, hidden, ids):
    """Log probability `(batch, time)` of each id, by blocks of rows."""
    shape = tf.shape(ids)
    hidden = tf.reshape(hidden, [-1, hidden.shape[-1]])
    flat = tf.reshape(ids, [-1])
    num = tf.size(flat)
    num_blocks = (num + _ROWS_OF_LOGITS - 1) // _ROWS_OF_LOGITS

    def body(i, found):
        rows = slice(i * _ROWS_OF_LOGITS, (i + 1) * _ROWS_OF_LOGITS)
        logits = model.softmax(hidden[tf.newaxis, rows])[0]
        part = -functional.cross_entropy(logits, flat[rows])
        return i + 1, found.write(i, part)

    dtype = at_least_float32(model.compute_dtype)
    found = tf.TensorArray(dtype, num_blocks, infer_shape=False, element_shape=[None])
    found = tf.while_loop(lambda i, _: i < num_blocks, body, (0, found))[1]
    return tf.reshape(found.concat(), shape)


def _generate(model, text):
    spec, encode = _read(text)
    if text is not None:
        spec = tf.TensorSpec(spec.shape, spec.dtype, "prompt")

    def call(prompt, temperature, top_k, max_new_tokens, seed):
        ids = encode(prompt)
        lengths = tf.reduce_sum(tf.cast(tf.not_equal(ids, PAD_ID), tf.int32), axis=1)
        checks = _checks(model, lengths, temperature, top_k, max_new_tokens, seed)
        if text is not None:
            # The last line goes on, and a text begins after the end of a line:
            # the end that `encode` puts last belongs in front.
            rows, time = tf.unstack(tf.shape(ids))
            ids = tf.where(tf.sequence_mask(lengths - 1, time), ids, tf.zeros_like(ids))
            ids = tf.concat([tf.fill([rows, 1], EOS_ID), ids[:, :-1]], axis=1)
        with tf.control_dependencies(checks):
            new = continue_tokens(
                model,
                tf.identity(ids),
                lengths,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                seeds=seed,
                forbidden_tokens=(0,) if text is None else (0, 1),
            )
        if text is None:
            return {"tokens": new}
        whole = tf.concat([ids[:, 1:], new], axis=1)
        return {
            "continuation": text.decode(tf.RaggedTensor.from_tensor(new)),
            "text": text.decode(tf.RaggedTensor.from_tensor(whole)),
            "tokens": text.tokens(new),
        }

    return signature([spec, *_SETTINGS], call, "generate")


def _checks(model, lengths, temperature, top_k, max_new_tokens, seed):
    """Assertions that say which input is wrong, what it was, and what to send."""
    rows = tf.shape(lengths)
    checks = []
    for name, value in (
        ("temperature", temperature),
        ("top_k", top_k),
        ("max_new_tokens", max_new_tokens),
        ("seed", seed),
    ):
        same = tf.reduce_all(tf.equal(tf.shape(value), rows))
        message = f"`{name}` must have one value a row. Received, and rows:"
        checks.append(tf.debugging.Assert(same, [message, tf.shape(value), rows]))
    size = model.vocabulary_size
    for name, value, least, most, rule in (
        ("temperature", temperature, 0.0, float("inf"), "a finite number from 0"),
        ("top_k", top_k, 0, size, f"from 0 (all) to {size}"),
        ("max_new_tokens", max_new_tokens, 1, MOST_NEW_TOKENS, "1 to 1024"),
        ("inputs", lengths, 1, tf.int32.max, "at least one token a row; begin with 2"),
    ):
        right = tf.reduce_all((value >= least) & (value <= most))
        if value.dtype.is_floating:
            right &= tf.reduce_all(tf.math.is_finite(value))
        checks.append(
            tf.debugging.Assert(right, [f"`{name}` must be {rule}. Received:", value])
        )
    return checks


def _routing(model, text):
    spec, encode = _read(text)

    def call(given):
        ids = encode(given)
        with recorded_routing(model.moe_layers) as records:
            _hidden(model, ids)
        answer = routing_outputs(records)
        return answer if text is None else {"tokens": text.tokens(ids), **answer}

    return signature([spec], call, "routing")
