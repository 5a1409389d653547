"""Continuing texts token by token, with the states of the model carried."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_moe.models.sampling import row_uniforms, sample_tokens


def continue_tokens(
    model: Any,
    tokens: tf.Tensor,
    lengths: tf.Tensor,
    *,
    max_new_tokens: tf.Tensor,
    temperature: tf.Tensor,
    top_k: tf.Tensor,
    seeds: tf.Tensor,
    forbidden_tokens: Sequence[int] = (0,),
) -> tf.Tensor:
    """Continues every row of a batch, each with settings of its own.

    Args:
        model: A `MoELanguageModel` or `MoETransformerLanguageModel`.
        tokens: `(batch, time)` int32, filled up with 0 at the end.
        lengths: `(batch,)` int32 of at least 1, the number of real tokens.
        max_new_tokens: `(batch,)` int32, the number of tokens to add.
        temperature: `(batch,)` float32. 0 takes the most probable token.
        top_k: `(batch,)` int32. Draws among that many; 0 means all.
        seeds: `(batch,)` int64.
        forbidden_tokens: Ids that are never drawn. Defaults to `(0,)`: padding.

    Returns:
        `(batch, max(max_new_tokens))` int32: the new tokens alone, filled up
        with 0 at the end.
    """
    batch_size, time = tf.unstack(tf.shape(tokens))
    num_steps = tf.reduce_max(tf.pad(max_new_tokens, [[0, 1]]))
    uniforms = row_uniforms(seeds, num_steps)

    def choose(step, hidden):
        drawn = sample_tokens(
            model.softmax(hidden[:, tf.newaxis])[:, 0],
            uniforms[:, step],
            temperature=temperature,
            top_k=top_k,
            forbidden_tokens=forbidden_tokens,
        )
        return tf.where(step < max_new_tokens, drawn, tf.zeros_like(drawn))

    def next_step(step, token, state, chosen):
        hidden, state = model.hidden_with_state(token[:, tf.newaxis], state)
        token = choose(step, hidden[:, 0])
        return step + 1, token, state, chosen.write(step, token)

    def run():
        # States stop where the text of a row ends.
        hidden, state = model.hidden_with_state(
            tokens,
            model._state_for(batch_size, time + num_steps),
            state_mask=tf.sequence_mask(lengths, time),
        )
        first = choose(0, tf.gather(hidden, lengths - 1, batch_dims=1))
        chosen = tf.TensorArray(tf.int32, num_steps, element_shape=(None,))
        chosen = tf.while_loop(
            lambda step, *_: step < num_steps,
            next_step,
            (1, first, state, chosen.write(0, first)),
        )[-1]
        return tf.transpose(chosen.stack())

    return tf.cond(
        tf.greater(num_steps, 0), run, lambda: tf.zeros((batch_size, 0), tf.int32)
    )
