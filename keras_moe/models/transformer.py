"""A decoder-only transformer whose blocks may hold mixtures of experts."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks
from keras_moe.data.vocabulary import PAD_ID
from keras_moe.layers import configs, masks
from keras_moe.layers.causality import verify_causal
from keras_moe.layers.dropout import Dropout
from keras_moe.layers.embedding import Embedding
from keras_moe.layers.moe import MoE, mixtures_of
from keras_moe.layers.tracking import track_entries
from keras_moe.layers.transformer import MoETransformerBlock
from keras_moe.layers.transformer_checks import verify_normalization
from keras_moe.layers.word_scores import Dense as WordScores
from keras_moe.models.generation import Generation
from keras_moe.models.language_model_checks import verify_tokens
from keras_moe.models.parts import SavedWhole, TracedFunctions
from keras_moe.types import at_least_float32


@keras.saving.register_keras_serializable(package="keras_moe")
class MoETransformerLanguageModel(SavedWhole, Generation, keras.Model):
    """Embedding, causal transformer blocks, normalization, softmax.

    Which blocks have a mixture, what their attention is and whether it has rotary
    positions, say the blocks.

    Args:
        vocabulary_size: Int. Number of token ids; id 0 is padding.
        blocks: List of `MoETransformerBlock`s with `causal=True`.
        units: Int. Width of the embedding and of every block. Defaults to `512`.
        max_length: Int. Most tokens of a text that `generate` writes, and with
            `learned_positions` of any sequence. Defaults to `1024`.
        learned_positions: Bool. Whether an embedding of the position is added to that
            of the token; leave it out where the blocks have rotary positions. Defaults
            to `False`.
        tied: Bool. Whether the softmax has the embedding for its kernel, and no bias.
            Defaults to `False`.
        normalization: A layer for the output of the last block. None means
            `keras.layers.LayerNormalization(epsilon=1e-5)`. Defaults to `None`.
        dropout: Float. Fraction of the embedding that is dropped in training; the
            blocks have rates of their own. Defaults to `0.0`.

    Call arguments:
        inputs: Int tensor `(batch, time)` of token ids.
        training: Bool. Whether there is dropout and noise of the gates.

    Input shape:
        `(batch, time)`.

    Output shape:
        Logits `(batch, time, vocabulary_size)`, float32 under every policy. Position t
        predicts token t + 1.

    Losses and state:
        The balancing losses of the mixtures. Padding (id 0) is neither attended to,
        routed nor counted, and carries a Keras mask to loss and metrics. No carried
        state: every sequence begins anew.

    Raises:
        ValueError: A size or rate is out of range; there is no block, or one that is no
            block, not causal, or has a gate that sees other tokens;
            inputs are not integers of rank 2, or longer than `max_length` where that
            counts.

    Example:

    >>> def block(moe=None):
    ...     return keras_moe.layers.MoETransformerBlock(
    ...         4, moe, causal=True, max_wavelength=10000.0
    ...     )
    >>> moe = keras_moe.layers.MoE(keras_moe.layers.FeedForwardExperts(8, 32))
    >>> model = keras_moe.models.MoETransformerLanguageModel(
    ...     100, [block(), block(moe)], units=16
    ... )
    >>> model(np.ones((2, 5), "int32")).shape.as_list()
    [2, 5, 100]
    >>> model.generate(np.ones((2, 3), "int32"), max_new_tokens=4).shape
    (2, 7)

    Reference:
        Radford et al. 2019, "Language models are unsupervised multitask learners", for
        the order of the parts; Lepikhin et al. 2020, "GShard", for the mixtures.
    """

    def __init__(
        self,
        vocabulary_size: int,
        blocks: Sequence[MoETransformerBlock],
        *,
        units: int = 512,
        max_length: int = 1024,
        learned_positions: bool = False,
        tied: bool = False,
        normalization: keras.layers.Layer | None = None,
        dropout: float = 0.0,
        name: str = "moe_transformer_language_model",
        **kwargs: Any,
    ):
        vocabulary_size = checks.verify_positive_int(vocabulary_size, "vocabulary_size")
        units = checks.verify_positive_int(units, "units")
        max_length = checks.verify_positive_int(max_length, "max_length")
        dropout = checks.verify_rate(dropout, "dropout")
        super().__init__(name=name, **kwargs)
        policy = self.dtype_policy
        self.vocabulary_size = vocabulary_size
        self.units = units
        self.max_length = max_length
        self.learned_positions = bool(learned_positions)
        self.tied = bool(tied)
        self.dropout = dropout
        self.blocks = _as_blocks(blocks)
        verify_normalization(normalization)
        track_entries(self, "blocks")
        if normalization is None:
            normalization = keras.layers.LayerNormalization(epsilon=1e-5, dtype=policy)
        self.normalization = normalization
        configs.hold(self, *self.blocks, normalization)
        self.embedding = Embedding(
            vocabulary_size, units, name="embedding", dtype=policy
        )
        self.position_embedding = (
            Embedding(
                max_length,
                units,
                of_words=False,
                name="position_embedding",
                dtype=policy,
            )
            if self.learned_positions
            else None
        )
        self.embedding_dropout = Dropout(dropout, dtype=policy)
        float_type = at_least_float32(self.compute_dtype).name
        self.softmax_dense = (
            None
            if self.tied
            else WordScores(vocabulary_size, dtype=float_type, name="softmax")
        )
        self._traced_functions = TracedFunctions()

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixtures of the blocks."""
        return [moe for block in self.blocks for moe in mixtures_of(block)]

    def build(self, input_shape):
        shape = (None, None, self.units)
        self.embedding.build((None, None))
        if self.position_embedding is not None:
            self.position_embedding.build((None, None))
        self.embedding_dropout.build(shape)
        for layer in (*self.blocks, self.normalization, self.softmax_dense):
            if layer is not None and not layer.built:
                layer.build(shape)
        self.built = True

    def call(self, inputs, training=None):
        tokens = verify_tokens(inputs, self.vocabulary_size)
        mask = tf.not_equal(tokens, PAD_ID)
        x = self._embedded(tokens, 0, training)
        for block in self.blocks:
            x = block(x, mask=mask, training=training)
        return self.softmax(self.normalization(x))

    def _embedded(self, tokens, start, training):
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            time = tokens.shape[1]
            if time is not None and time > self.max_length:
                raise ValueError(
                    "Sequences must be at most `max_length` tokens long with learned "
                    f"positions. Received: {time} tokens, max_length="
                    f"{self.max_length}. Cut them, or make the model with more."
                )
            positions = masks.positions_from(start, tf.shape(tokens)[1])
            x += self.position_embedding(positions)
        return self.embedding_dropout(x, training=training)

    def softmax(self, hidden) -> tf.Tensor:
        """Logits, before the softmax itself.

        Args:
            hidden: Float tensor `(batch, time, units)`, from `hidden_with_state`.

        Returns:
            `(batch, time, vocabulary_size)`, float32 at least.
        """
        if self.softmax_dense is not None:
            return self.softmax_dense(hidden)
        kind = at_least_float32(self.compute_dtype)
        vocabulary = self.embedding.vocabulary
        if vocabulary is not None:
            hidden = tf.cast(hidden, self.embedding.variable_dtype)
            logits = vocabulary.logits(hidden, self.embedding.embeddings)
            return tf.cast(logits, kind)
        kernel = tf.convert_to_tensor(self.embedding.embeddings)
        return tf.einsum("btd,vd->btv", tf.cast(hidden, kind), tf.cast(kernel, kind))

    def initial_state(self, batch_size: Any, length: Any = None) -> dict[str, Any]:
        """Empty caches of all blocks.

        Args:
            batch_size: Int or scalar int tensor.
            length: Int or scalar int tensor, the tokens that they have room for. None
                means `max_length`. Defaults to `None`.

        Returns:
            `"index"`, `(batch_size,)` int32, the number of tokens in each row, and
            `"caches"`, those of each block, see `MoETransformerBlock.initial_cache`.
        """
        if not self.built:
            self.build(None)
        length = self.max_length if length is None else length
        return {
            "index": tf.zeros((batch_size,), tf.int32),
            "caches": [
                block.initial_cache(batch_size, length) for block in self.blocks
            ],
        }

    def _state_for(self, batch_size, length):
        return self.initial_state(batch_size, length)

    def hidden_with_state(
        self, tokens, state, training: bool = False, *, state_mask=None
    ):
        """What the softmax is given, and the state to go on with.

        Args:
            tokens: Int tensor `(batch, time)`, after those in the caches.
            state: From `initial_state` or an earlier call.
            training: Bool. Must be False: caches are for inference. Defaults to
                `False`.
            state_mask: Bool tensor `(batch, time)` or None. Tokens marked False, at the
                end of a row, are not in the state. None: no such tokens. Defaults to
                `None`.

        Returns:
            hidden: `(batch, time, units)`; `self.softmax(hidden)` are logits.
            state: The state after the last token.
        """
        if training:
            raise ValueError(
                "`training` must be False with a state, which is for inference. "
                "Received: training=True. Call the model to train it."
            )
        tokens = verify_tokens(tokens, self.vocabulary_size, "tokens")
        checks.verify_shape(tokens.shape, "that of `tokens`", state_mask=state_mask)
        index = state["index"]
        mask = tf.not_equal(tokens, PAD_ID)
        steps = tf.ones_like(tokens)
        if state_mask is not None:
            mask &= state_mask
            steps = tf.cast(state_mask, tf.int32)
        x, caches = self._embedded(tokens, index, False), []
        for block, cache in zip(self.blocks, state["caches"], strict=True):
            x, cache = block.call_with_cache(x, cache, index, mask=mask)
            caches.append(cache)
        state = {"index": index + tf.reduce_sum(steps, axis=1), "caches": caches}
        return self.normalization(x), state

    def generate(self, prompt, max_new_tokens: int = 50, **kwargs):
        """Continues token sequences by sampling, as `MoELanguageModel.generate`.

        Args:
            prompt: Int array `(batch, time)` without padding, time at least 1.
            max_new_tokens: Int. Tokens to add. Defaults to `50`.
            **kwargs: `temperature`, `top_k`, `seed` and `forbidden_tokens`.

        Returns:
            `(batch, time + max_new_tokens)` int32, the prompt included.

        Raises:
            ValueError: An argument is out of range, or the text would be longer than
                `max_length`.
        """
        prompt = verify_tokens(prompt, self.vocabulary_size, "prompt")
        max_new_tokens = checks.verify_positive_int(max_new_tokens, "max_new_tokens")
        if prompt.shape[1] + max_new_tokens > self.max_length:
            raise ValueError(
                "`prompt` and `max_new_tokens` must together be at most `max_length`. "
                f"Received: {prompt.shape[1]} tokens, max_new_tokens={max_new_tokens}, "
                f"max_length={self.max_length}. Cut the prompt, or ask for less."
            )
        return super().generate(prompt, max_new_tokens, **kwargs)

    def compute_mask(self, inputs, previous_mask=None):
        return keras.ops.not_equal(inputs, PAD_ID)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.vocabulary_size)

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "blocks": configs.serialize_all(self, self.blocks),
            "units": self.units,
            "max_length": self.max_length,
            "learned_positions": self.learned_positions,
            "tied": self.tied,
            "normalization": configs.serialize(
                self, self.normalization, len(self.blocks)
            ),
            "dropout": self.dropout,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        checks.verify_config(cls, config)
        blocks = configs.deserialize_all(config["blocks"], custom_objects)
        normalization = configs.deserialize(
            config.get("normalization"), None, custom_objects
        )
        return cls(**{**config, "blocks": blocks, "normalization": normalization})


def _as_blocks(blocks):
    blocks = list(blocks) if isinstance(blocks, Sequence) else [blocks]
    if not blocks:
        raise ValueError(
            "`blocks` must be a list of at least one MoETransformerBlock. Received: "
            "blocks=[]. Without any the model sees the last token alone."
        )
    for block in blocks:
        if not isinstance(block, MoETransformerBlock) or not block.causal:
            raise ValueError(
                "`blocks` must be a list of MoETransformerBlocks with causal=True. "
                f"Received: {block!r}. Others would see the tokens they predict."
            )
    verify_causal(blocks, "blocks", "MoETransformerLanguageModel")
    return blocks
