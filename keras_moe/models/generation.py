"""Generating text and looking at its routing, as methods of a language model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.layers.routing_record import recorded_routing, routing_arrays
from keras_moe.models.continuation import continue_tokens
from keras_moe.models.language_model_checks import verify_tokens
from keras_moe.models.sampling import verify_sampling

_Model: Any = keras.Model if TYPE_CHECKING else object


class Generation(_Model):
    """`generate` and `routing` for a model with `hidden_with_state`."""

    def generate(
        self,
        prompt,
        max_new_tokens: int = 50,
        *,
        temperature: Any = 1.0,
        top_k: Any = None,
        seed: int | None = None,
        forbidden_tokens: Sequence[int] = (0,),
    ) -> np.ndarray:
        """Continues token sequences by sampling.

        Args:
            prompt: Int array `(batch, time)` without padding, time at least 1.
            max_new_tokens: Int. Tokens to add. Defaults to `50`.
            temperature: Float, or one a row. Divides the logits; 0 takes the most
                probable token. Defaults to `1.0`.
            top_k: Int, one a row, or None. Samples among the `top_k` most probable
                tokens only. Defaults to `None`: all.
            seed: Int or None. The same seed gives the same text; row r draws
                with `seed + r`. Defaults to `None`.
            forbidden_tokens: Ids never sampled. Defaults to `(0,)`: padding.

        Returns:
            `(batch, time + max_new_tokens)` int32, the prompt included.

        Raises:
            ValueError: An argument is out of range.
        """
        tokens = verify_tokens(prompt, self.vocabulary_size, "prompt")
        max_new_tokens = checks.verify_positive_int(max_new_tokens, "max_new_tokens")
        if tokens.shape[1] == 0:
            raise ValueError(
                "`prompt` must have at least one token. Received: "
                f"prompt.shape={tokens.shape}. Begin with the end-of-sentence token."
            )
        temperature, top_k, forbidden = verify_sampling(
            temperature,
            top_k,
            self.vocabulary_size,
            forbidden_tokens,
            tokens.shape[0],
        )
        if seed is None:
            seed = int(np.random.default_rng().integers(2**62))
        seed = checks.verify_seed(seed)
        if not self.built:
            self.build(tokens.shape)
        rows = tokens.shape[:1]
        new_tokens = self._traced_functions.get(
            forbidden, lambda: self._continue(forbidden)
        )(
            tokens,
            tf.fill(rows, tokens.shape[1]),
            max_new_tokens=tf.fill(rows, max_new_tokens),
            temperature=tf.broadcast_to(tf.cast(temperature, tf.float32), rows),
            top_k=tf.broadcast_to(
                tf.cast(0 if top_k is None else top_k, tf.int32), rows
            ),
            seeds=seed + tf.range(rows[0], dtype=tf.int64),
        )
        return tf.concat([tokens, new_tokens], axis=1).numpy()

    def _state_for(self, batch_size, length):
        """The state before a text of at most so many tokens."""
        return self.initial_state(batch_size)

    def _continue(self, forbidden_tokens):
        """`continue_tokens`, traced once for all sizes."""
        rows = tf.TensorSpec((None,), tf.int32)

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, None), tf.int32),
                *[rows] * 2,
                tf.TensorSpec((None,), tf.float32),
                rows,
                tf.TensorSpec((None,), tf.int64),
            ],
            autograph=False,
        )
        def traced(tokens, lengths, max_new_tokens, temperature, top_k, seeds):
            return continue_tokens(
                self,
                tokens,
                lengths,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                seeds=seeds,
                forbidden_tokens=forbidden_tokens,
            )

        return traced

    def routing(self, tokens) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Which experts take each token, in inference.

        Args:
            tokens: Int array `(batch, time)`.

        Returns:
            For each mixture, under its layer's name: expert indices and gates,
            both `(batch, time, k)`. Where a gate gives tokens different numbers
            of experts, k is the largest of them, filled up with -1 and 0, as is
            padding.
        """
        tokens = verify_tokens(tokens, self.vocabulary_size, "tokens")
        if not self.built:
            self.build(tokens.shape)
        with recorded_routing(self.moe_layers) as records:
            self.hidden_with_state(tokens, self.initial_state(tokens.shape[0]))
        return routing_arrays(records)
