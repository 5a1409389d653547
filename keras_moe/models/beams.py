"""Beam search over a step function, by the TensorFlow model garden."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_moe import checks
from keras_moe.models.translation_checks import verify_decoding

_NEVER = -1e9


def beam_search(
    step: Callable[[tf.Tensor, Any], tuple[tf.Tensor, Any]],
    start: tf.Tensor,
    state: Any,
    *,
    vocabulary_size: int,
    eos_id: int,
    num_beams: int = 4,
    length_penalty: float = 0.2,
    max_length: int = 100,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The most probable sequences, by beam search.

    A hypothesis Y scores $\\log P(Y) / ((5 + |Y|) / 6)^\\alpha$, its `<eos>`
    counted; alpha is `length_penalty`. There is no coverage penalty.

    With one beam this is greedy decoding: the most probable token at each step,
    until that is `<eos>`, whatever the length penalty.

    Args:
        step: Takes tokens `(batch * num_beams,)` int32 and the state, and returns
            logits `(batch * num_beams, vocabulary_size)` float32 and the next
            state.
        start: `(batch,)` int32, the first input of each sequence.
        state: Nested dict of float32 tensors `(batch, ...)`.
        vocabulary_size: Int. Number of logits.
        eos_id: Int. Ends a sequence.
        num_beams: Int. Hypotheses kept for each sequence. Defaults to `4`.
        length_penalty: Float, alpha. Defaults to `0.2`, that of GNMT.
        max_length: Int. Most tokens of a sequence, `<eos>` included. Defaults to
            `100`.

    Returns:
        tokens: `(batch, num_beams, length)` int32, the best first; 0 after
            `<eos>`.
        scores: `(batch, num_beams)` float32. With one beam 0.

    Raises:
        ImportError: tf-models-official is not installed.
        ValueError: An option is out of range, or `start` is not one token for each row
            of the state.

    Reference:
        Wu et al. 2016, "Google's neural machine translation system", section 7.
    """
    try:
        from official.nlp.modeling.ops import beam_search as garden
    except ImportError as error:
        raise ImportError(
            "Beam search needs tf-models-official. Install keras-moe[translation]."
        ) from error

    options = verify_decoding(num_beams, length_penalty, max_length)
    num_beams, length_penalty, max_length = options
    vocabulary_size = checks.verify_int(vocabulary_size, "vocabulary_size", 2)
    eos_id = checks.verify_int(eos_id, "eos_id", 0, vocabulary_size - 1)
    start = tf.cast(checks.verify_ids(start, "start", vocabulary_size), tf.int32)
    checks.verify_shape([None], "one token a row", start=start)
    for part in tf.nest.flatten(state):
        rows = part.shape[:1]
        checks.verify_shape(rows, "one token for each row of `state`", start=start)

    def symbols_to_logits(ids, _, cache):
        logits, cache = step(ids[:, -1], cache)
        if num_beams == 1:
            # The search keeps the second-best token too, and prefers a sequence
            # that ended with it to a longer one of lower score. Without an
            # alternative to the best there is nothing to prefer.
            best = tf.one_hot(tf.argmax(logits, axis=-1), vocabulary_size)
            logits = _NEVER * (1.0 - best)
        return logits, cache

    tokens, scores = garden.sequence_beam_search(
        symbols_to_logits,
        initial_ids=start,
        initial_cache=state,
        vocab_size=vocabulary_size,
        beam_size=num_beams,
        alpha=0.0 if num_beams == 1 else length_penalty,
        max_decode_length=max_length,
        eos_id=eos_id,
    )
    return tokens[:, :, 1:], scores
