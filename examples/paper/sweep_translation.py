"""Arms of the sweep that are translation models.

The folders of `--data-dir` are one training set; the validation and the test pairs of
each folder and direction are a set of their own.
"""

import dataclasses
import math
import re
import time
from typing import ClassVar

import keras
import numpy as np
import sweep_arm
import tensorflow as tf
from experiment import start_afresh

from keras_moe import data, models, telemetry, writing
from keras_moe.commands import pairs, runs, train_mt
from keras_moe.commands.options import TrainMTOptions
from keras_moe.data.translation import split_direction
from keras_moe.data.vocabulary import PAD_ID

ARMS = ["dense_32", "moe_32", "decoder_moe_32"]
# For a test.
QUICK_ARMS = ["dense_4", "decoder_moe_4"]
QUICK = {"steps": 6, "vocabulary_size": 400, "units": 16, "hidden_units": 16}
QUICK |= {"points": 2, "directions": "en-fr,fr-en", "validation_pairs": 50}
QUICK |= {"sentences": 4, "test_sentences": 8, "num_beams": 2, "batch_tokens": 256}
QUICK |= {"longest": 16}
# Subwords of sentences that a model is judged by: no pair is left out.
LONGEST = 512
SIDES = ("encoder", "decoder")
PARTS = ("embedding", "lstm", "gating", "experts", "attention", "softmax")


@dataclasses.dataclass(frozen=True)
class TranslationArm(sweep_arm.Arm):
    """One model, and how it is trained; the fields are those of `train-mt`.

    Attributes:
        corpus: Name of the data: `"embedded"`, or those of the folders.
        mixtures: The side that has a mixture, or both.
        dense_units: Hidden units of the dense expert of the other side.
        steps: Of training.
        points: How often it is measured, after equal numbers of steps.
        validation_pairs: So many of each set are read at each point, at most.
        sentences: So many of each set are translated greedily at each point.
        test_sentences: So many of each test set are translated at the end by
            `num_beams` beams, with `--test`; None: all.
        longest: Subwords of a translation, at most.
    """

    directions: str | None = None
    vocabulary_size: int = 8_000
    steps: int = 8_000
    mixtures: str = "both"
    num_experts: int = 32
    k: int = 2
    hidden_units: int = 384
    dense_units: int = 0
    units: int = 192
    dropout: float = 0.1
    warmup_steps: int = 400
    batch_tokens: int = 2048
    max_length: int = 96
    temperature: float = 1.0
    points: int = 8
    validation_pairs: int = 500
    sentences: int = 100
    test_sentences: int | None = None
    num_beams: int = 4
    length_penalty: float = 0.6
    longest: int = 128

    # What changes nothing of the training: it goes on, and is not done again.
    TEST_ONLY: ClassVar = ("test_sentences", "num_beams", "length_penalty")

    @property
    def middles(self):
        """What stands between the LSTMs of encoder and decoder."""
        with_mixture = SIDES if self.mixtures == "both" else (self.mixtures,)
        return [self.middle if s in with_mixture else "moe_1_wide" for s in SIDES]

    def count(self):
        """A `models.Count`, of one source and one target word.

        The mean of a model whose sides are both like the encoder, and of one whose
        sides are both like the decoder.
        """
        counts = [models.count(self._preset(middle)) for middle in self.middles]
        return models.Count(
            *(
                {n: sum(getattr(c, what)[n] for c in counts) // 2 for n in PARTS}
                for what in ("operations", "parameters")
            )
        )

    def _preset(self, middle):
        """Of a model with the same on both sides."""
        hidden, shared = self.hidden_units, self.shared_units
        is_dense = middle == "moe_1_wide"
        return models.Preset(
            "arm",
            kind="translation",
            vocabulary_size=self.vocabulary_size,
            units=self.units,
            middle=middle,
            num_experts=self.num_experts if middle == "moe" else 0,
            k=(1 if is_dense else self.k,),
            hidden_units=self.dense_units if is_dense else hidden,
            shared_units=0 if is_dense else shared,
            gating=self.gating,
            noise=self.options_of(TrainMTOptions).noise_stddev,
            encoder_lstms=3,
            decoder_lstms=2,
            moe_after=(2, 1),
        )

    def options(self):
        """Those of `train-mt`."""
        # The order of the pairs is the same whatever the seed of the model.
        return self.options_of(TrainMTOptions, seed=1)

    def build(self, vocabulary):
        """The compiled model, which counts what it is shown."""
        model = train_mt.build_model(
            self.options(),
            vocabulary,
            self.middle,
            self.steps,
            dense_units=self.dense_units or None,
        )
        metrics = [telemetry.Perplexity(), Seen("pairs"), Seen("tokens")]
        model.compile(model.optimizer, model.loss, weighted_metrics=metrics)
        return model

    def run(self, folder, corpus, with_test):
        """Trains and measures, from the last point kept in `folder`.

        Returns:
            Dict of figures: `curve` has a point for each measurement.
        """
        keras.utils.set_random_seed(1)
        options = self.options()
        names = ("batch_tokens", "max_length", "temperature", "seed")
        train = corpus.train.dataset(
            "train", corpus.vocabulary, **{n: getattr(options, n) for n in names}
        )
        start_afresh(self.seed)
        model = self.build(corpus.vocabulary)
        curve = sweep_arm.resume(folder, model)
        done = len(curve)
        steps = self.steps // self.points
        if done < self.points:
            model.fit(
                # An arm that goes on, goes on with the pairs that come next.
                train.repeat().skip(steps * done),
                steps_per_epoch=steps,
                epochs=self.points,
                initial_epoch=done,
                shuffle=False,
                verbose=0,
                callbacks=[runs.NoiseOfEpoch(), Measure(self, folder, corpus, curve)],
            )
        results = {**self.results(curve), "bleu": curve[-1]["bleu"]}
        if with_test:
            results |= self.test(model, corpus)
        return results

    def test(self, model, corpus):
        """Perplexity, BLEU and chrF of the test sets."""
        sets = Sets(self, corpus, "test")
        measured = sets.perplexities(model)
        scores = sets.scores(
            model,
            self.test_sentences,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
        )
        for name, perplexity in measured.pop("perplexities").items():
            scores[name]["perplexity"] = perplexity
        return {
            **{f"test_{name}": value for name, value in measured.items()},
            "test_bleu": float(np.mean([s["bleu"] for s in scores.values()])),
            "test": scores,
        }


@keras.saving.register_keras_serializable(package="sweep")
class Seen(keras.metrics.Metric):
    """Counts what a model was shown: `"pairs"`, or `"tokens"` of the targets."""

    def __init__(self, name):
        super().__init__(name=name)
        # Exact below 2^24, which a point does not reach.
        self.total = self.add_variable((), "zeros", name="total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        real = tf.cast(tf.not_equal(y_true, PAD_ID), self.total.dtype)
        if self.name == "pairs":
            real = tf.reduce_max(real, axis=1)
        self.total.assign_add(tf.reduce_sum(real))

    def result(self):
        return self.total


class Measure(keras.callbacks.Callback):
    """Adds a point to the curve after every epoch, and keeps the weights."""

    def __init__(self, arm, folder, corpus, curve):
        super().__init__()
        self.arm, self.folder, self.corpus, self.curve = arm, folder, corpus, curve
        self._is_running = False
        self.held_out = Sets(arm, corpus, "valid", arm.validation_pairs)

    def on_epoch_begin(self, epoch, logs=None):
        self._clock, self._cpu = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, batch, logs=None):
        # The first step waits until all pairs are encoded, and is traced.
        if not self._is_running:
            self._clock, self._cpu = time.perf_counter(), time.process_time()
            self._is_running = True

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.perf_counter() - self._clock, time.process_time() - self._cpu
        before = self.curve[-1] if self.curve else {"pairs": 0, "tokens": 0}
        clock = time.perf_counter()
        measured = self.held_out.perplexities(self.model)
        scores = self.held_out.scores(self.model, self.arm.sentences, num_beams=1)
        point = {
            "steps": (epoch + 1) * (self.arm.steps // self.arm.points),
            **{name: int(before[name] + logs[name]) for name in ("pairs", "tokens")},
            **measured,
            "bleu": float(np.mean([s["bleu"] for s in scores.values()])),
            "bleus": {name: s["bleu"] for name, s in scores.items()},
            "training_loss": logs["loss"],
            "training_perplexity": logs["perplexity"],
            "seconds": round(seconds[0], 1),
            "cpu_seconds": round(seconds[1], 1),
            "measuring_seconds": round(time.perf_counter() - clock, 1),
            **sweep_arm.of_experts(logs, "training_"),
        }
        self.curve.append(point)
        if not math.isfinite(point["perplexity"]):
            self.model.stop_training = True
            return
        sweep_arm.keep(self.folder, self.model, self.curve)
        print(
            f"{point['pairs']:>10,} pairs, {point['tokens']:>12,} tokens: "
            f"perplexity {point['perplexity']:.2f}, BLEU {point['bleu']:.1f}",
            flush=True,
        )


class Sets:
    """The pairs of a split that a model is judged by, set by set."""

    def __init__(self, arm, corpus, split, most=None):
        self.arm = arm
        self.pairs = {
            name: (direction, [side[:most] for side in sides[split]])
            for name, (direction, sides) in corpus.sets.items()
        }
        # Once each, in their order.
        batch_tokens = max(4096, arm.batch_tokens)
        changes = {"max_length": LONGEST, "batch_tokens": batch_tokens}
        options = dataclasses.replace(arm.options(), **changes, temperature=1.0)
        self.batches = {}
        for name, (direction, sides) in self.pairs.items():
            one = data.TranslationCorpus(name, {split: {direction: tuple(sides)}})
            found = pairs.epoch_batches(one, split, corpus.vocabulary, options)
            self.batches[name] = pairs.of_known_length(*found)

    def perplexities(self, model):
        """Perplexity of all pairs and of each set, and the experts' load over all."""
        logs, counts = {}, {}
        for name, batches in self.batches.items():
            logs[name] = model.evaluate(batches, verbose=0, return_dict=True)
            for layer in model.moe_layers:
                if layer.num_experts > 1:
                    own = layer.balance.counts().numpy()
                    counts[layer.name] = counts.get(layer.name, 0.0) + own
        tokens = [found["tokens"] for found in logs.values()]
        losses = [math.log(found["perplexity"]) for found in logs.values()]
        return {
            "perplexity": math.exp(np.average(losses, weights=tokens)),
            "perplexities": {name: found["perplexity"] for name, found in logs.items()},
            **{f"{n}_load_cv": float(c.std() / c.mean()) for n, c in counts.items()},
            **{
                f"{n}_max_over_mean_load": float(c.max() / c.mean())
                for n, c in counts.items()
            },
        }

    def scores(self, model, most, **search):
        """BLEU and chrF of each set, of so many sentences at most."""
        found = {}
        for name, (direction, sides) in self.pairs.items():
            sources, targets = (side[:most] for side in sides)
            language = split_direction(direction)[1]
            start = time.perf_counter()
            texts = model.translate(
                sources, language, max_length=self.arm.longest, **search
            )
            found[name] = {
                **telemetry.translation_scores(texts, targets, language),
                "sentences": len(sources),
                "seconds": round(time.perf_counter() - start, 1),
            }
        return found


Arm = TranslationArm


def arm_of(name, common):
    """The arm of a name.

    Args:
        name: `moe_E`, `encoder_moe_E` or `decoder_moe_E`, whose other side has a dense
            expert of equal operations, or `dense_E`, both of whose sides have one.
        common: Dict of the settings that all arms share.
    """
    match = re.fullmatch(r"(moe|encoder_moe|decoder_moe|dense)_(\d+)", name)
    if match is None:
        raise SystemExit(
            "`--arms` must be such as moe_32, encoder_moe_32, decoder_moe_32 or "
            f"dense_32. Received: {name}."
        )
    kind, num_experts = match[1], int(match[2])
    mixture = TranslationArm(**{**common, "num_experts": num_experts})
    mixture = dataclasses.replace(mixture, k=min(mixture.k, num_experts))
    if kind == "moe":
        return mixture
    # Of both sides: 2 u h each.
    wanted = mixture.count().operations
    wide = round((wanted["gating"] + wanted["experts"]) / (4 * mixture.units))
    if kind != "dense":
        side = kind.removesuffix("_moe")
        return dataclasses.replace(mixture, mixtures=side, dense_units=wide)
    sizes = {"middle": "moe_1_wide", "k": 1, "hidden_units": 0, "dense_units": wide}
    return dataclasses.replace(mixture, **sizes, **sweep_arm.WITHOUT_MIXTURE)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The data of all arms.

    Attributes:
        train: `data.TranslationCorpus` with the training pairs of all folders.
        sets: Dict of a set's name to its direction, and its pairs by split.
        vocabulary: `data.SubwordVocabulary`.
    """

    train: data.TranslationCorpus
    sets: dict
    vocabulary: data.SubwordVocabulary


def read_corpus(options, arm):
    """The pairs; the subwords are learnt once and kept in the folder of the sweep."""
    directions = None if arm.directions is None else arm.directions.split(",")
    folders = options.data_dir or [None]
    read = [data.load_translation_corpus(f, directions=directions) for f in folders]
    train = read[0] if len(read) == 1 else merged(arm.corpus, read)
    sets = {}
    for corpus in read:
        for direction in corpus.directions:
            name = direction if len(read) == 1 else f"{corpus.name} {direction}"
            held_out = {s: corpus.pairs[s][direction] for s in ("valid", "test")}
            sets[name] = direction, held_out
    languages = train.target_languages
    named = [arm.corpus, str(arm.vocabulary_size), *train.directions]
    path = options.work / "_".join(named) / "subwords.model"
    if not path.exists():
        print(f"Learning subwords of {arm.corpus} ...", flush=True)
        learnt = data.SubwordVocabulary.learn(
            train.texts("train"), arm.vocabulary_size, languages
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.written_beside(path) as partial:
            partial.write_bytes(learnt.model)
    vocabulary = data.SubwordVocabulary(path.read_bytes(), languages)
    return Pairs(train, sets, vocabulary)


def merged(name, corpora):
    """One corpus of the training pairs of several."""
    train, seen = {}, {}
    for direction in dict.fromkeys(d for c in corpora for d in c.directions):
        parts = [c.pairs["train"].get(direction, ([], [])) for c in corpora]
        sides = []
        for lists in zip(*parts, strict=True):
            # The same list serves both directions of a pair of languages.
            known = tuple(map(id, lists))
            seen.setdefault(known, [text for one in lists for text in one])
            sides.append(seen[known])
        train[direction] = tuple(sides)
    return data.TranslationCorpus(name, {"train": train})
