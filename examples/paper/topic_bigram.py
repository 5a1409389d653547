"""A synthetic language with topics, on which mixtures of experts can be compared.

Every topic has a transition table of its own from token to token. A model is told the
topic of each sequence and has to know all tables: this takes capacity, and little
computation for a token. Data never end and the best possible perplexity is known.

The model is the paper's language model, small: the sum of a token and a topic embedding,
a residual LSTM, what is to be compared (usually a mixture of experts), a residual LSTM,
softmax.

    task = make_task(seed=0)
    model = build_model(keras_moe.layers.MoE(...), task)
    report = train(model, task, steps=1500, seed=0)
"""

import functools
import os
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_moe

TOPICS = 64
TOKENS = 64
UNITS = 32
BATCH_SIZE = 64
TIME = 16
PEAK_LEARNING_RATE = 5e-3
WARMUP_STEPS = 200


@dataclass(frozen=True)
class Task:
    """The language.

    Attributes:
        tables: `(TOPICS, TOKENS, TOKENS)`; row `[c, v]` is the distribution of the
            token after v in topic c.
        floor_perplexity: Of a model that knows the tables.
    """

    tables: np.ndarray
    floor_perplexity: float

    @functools.cached_property
    def _cumulative(self):
        return np.cumsum(self.tables, axis=2)

    def dataset(self, steps: int, seed: int) -> tf.data.Dataset:
        """`steps` fresh batches of `((topics, tokens), next tokens)`.

        Topics are `(BATCH_SIZE,)`, tokens and next tokens `(BATCH_SIZE, TIME)`. The
        first token of a sequence is uniform, the others follow the table of its topic.
        """

        def batches():
            rng = np.random.default_rng(seed)
            for _ in range(steps):
                topics, tokens = self.sample(rng)
                yield (topics, tokens[:, :-1]), tokens[:, 1:]

        sequence = tf.TensorSpec((BATCH_SIZE, TIME), tf.int32)
        signature = ((tf.TensorSpec((BATCH_SIZE,), tf.int32), sequence), sequence)
        data = tf.data.Dataset.from_generator(batches, output_signature=signature)
        return data.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(4)

    def sample(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Topics `(BATCH_SIZE,)` and sequences `(BATCH_SIZE, TIME + 1)`, int32."""
        topics = rng.integers(TOPICS, size=BATCH_SIZE)
        tokens = np.empty((BATCH_SIZE, TIME + 1), "int64")
        tokens[:, 0] = rng.integers(TOKENS, size=BATCH_SIZE)
        for t in range(TIME):
            drawn = (
                rng.uniform(size=(BATCH_SIZE, 1))
                > self._cumulative[topics, tokens[:, t]]
            )
            tokens[:, t + 1] = np.minimum(drawn.sum(axis=1), TOKENS - 1)
        return topics.astype("int32"), tokens.astype("int32")


def make_task(seed: int = 0) -> Task:
    """Draws the tables: softmax of 6 times standard normal logits."""
    logits = 6.0 * np.random.default_rng(seed).normal(size=(TOPICS, TOKENS, TOKENS))
    tables = np.exp(logits - logits.max(axis=2, keepdims=True))
    tables /= tables.sum(axis=2, keepdims=True)
    entropy = -np.sum(tables * np.log(tables + 1e-30), axis=2)  # of every row
    # How often a token is met, on average over the positions it is predicted from.
    met = np.full((TOPICS, TOKENS), 1.0 / TOKENS)
    mean_entropy = 0.0
    for _ in range(TIME):
        mean_entropy += np.sum(met * entropy) / (TOPICS * TIME)
        met = np.einsum("cv,cvw->cw", met, tables)
    return Task(tables, float(np.exp(mean_entropy)))


@keras.saving.register_keras_serializable(package="keras_moe_examples")
class Distractors(keras.layers.Layer):
    """Appends features of pure noise, of standard deviation 3, new at every call."""

    def __init__(self, features, **kwargs):
        super().__init__(**kwargs)
        self.features = features
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, inputs):
        shape = tf.concat([tf.shape(inputs)[:-1], [self.features]], axis=0)
        noise = keras.random.normal(shape, stddev=3.0, seed=self.seed_generator)
        noise.set_shape([*inputs.shape[:-1], self.features])
        return tf.concat([inputs, noise], axis=-1)

    def get_config(self):
        return {**super().get_config(), "features": self.features}


def build_model(
    middle: keras.layers.Layer | None,
    distractors: int = 0,
    embedding_initializer: Any = "uniform",
) -> keras.Model:
    """Logits of the next token, with `middle` between the two LSTMs.

    `middle` maps `(batch, time, UNITS + distractors)` to `(batch, time, UNITS)`; what
    it is given, without the distractors, is added to its output. None leaves it out.
    """
    topics = keras.Input((), dtype="int32", name="topics")
    tokens = keras.Input((TIME,), dtype="int32", name="tokens")
    topic, hidden = (
        keras.layers.Embedding(
            size, UNITS, embeddings_initializer=embedding_initializer, name=name
        )(ids)
        for size, name, ids in (
            (TOPICS, "topic_embedding", topics),
            (TOKENS, "token_embedding", tokens),
        )
    )
    hidden = hidden + keras.ops.expand_dims(topic, 1)
    first = keras.layers.LSTM(UNITS, return_sequences=True, name="first_lstm")
    hidden = hidden + first(hidden)
    if middle is not None:
        given = Distractors(distractors)(hidden) if distractors else hidden
        hidden = hidden + middle(given)
    last = keras.layers.LSTM(UNITS, return_sequences=True, name="last_lstm")
    hidden = hidden + last(hidden)
    logits = keras.layers.Dense(TOKENS, name="softmax")(hidden)
    return keras.Model([topics, tokens], logits)


def make_moe(
    gating: keras.layers.Layer, num_experts: int, loss_weights=(0.1, 0.1)
) -> keras_moe.layers.MoE:
    """The mixture of the experiments: hidden layers of 32, sigmoid on the output."""
    return keras_moe.layers.MoE(
        keras_moe.layers.FeedForwardExperts(num_experts, hidden_units=32),
        gating,
        importance_loss_weight=loss_weights[0],
        load_loss_weight=loss_weights[1],
        activation="sigmoid",
        name="moe",
    )


def train(
    model: keras.Model,
    task: Task,
    *,
    steps: int = 1500,
    seed: int = 0,
    evaluation_steps: int = 50,
    verbose: int = 0,
    optimizer: type[keras.optimizers.Optimizer] = keras.optimizers.Adam,
    batches: int | None = None,
) -> dict[str, float]:
    """Trains with Adam, or a relative, on fresh data; evaluates on other fresh data.

    With `batches` there are so many different batches of training, over and over.

    Returns:
        `perplexity` in inference mode and, for a mixture named "moe",
        `max_over_mean_load`, `load_cv` and `importance_cv` of the same data.
    """
    schedule = keras_moe.optimizers.WarmupInverseSquareRoot(
        PEAK_LEARNING_RATE, WARMUP_STEPS
    )
    model.compile(
        optimizer(schedule, global_clipnorm=5.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras_moe.telemetry.Perplexity()],
    )
    data = task.dataset(batches or steps, seed=1000 + seed)
    if batches:
        data = data.cache().shuffle(batches, seed=seed).repeat()
    model.fit(data, steps_per_epoch=steps, shuffle=False, verbose=verbose)
    return evaluate(model, task, steps=evaluation_steps)


def evaluate(model: keras.Model, task: Task, *, steps: int = 50) -> dict[str, float]:
    """The report of `train`, for a compiled model; the data are always the same."""
    data = task.dataset(steps, seed=999_999)
    logs = model.evaluate(data, verbose=0, return_dict=True)
    logs.pop("loss")
    return {name.removeprefix("moe_"): float(value) for name, value in logs.items()}
