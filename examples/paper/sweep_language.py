"""Arms of the sweep that are language models."""

import dataclasses
import math
import re
import time

import numpy as np
import sweep_arm
from experiment import start_afresh

from keras_moe import data, models
from keras_moe.commands import runs, train_lm
from keras_moe.commands.options import TrainLMOptions

UNITS, HIDDEN, K = 128, 256, 4
# More rows than in training: there is much of it, and the softmax is the full one.
EVALUATION_SHAPE = 32, 32
ARMS = ["dense_64", "moe_64"]
# For a test.
QUICK_ARMS = ["dense_8", "moe_8"]
QUICK = {"tokens": 6_000, "vocabulary_size": 1000, "units": 16, "hidden_units": 16}
QUICK |= {"points": 2, "validation_tokens": 2000, "num_sampled": 100}
QUICK |= {"batch_size": 8, "test_tokens": 2000}


@dataclasses.dataclass(frozen=True)
class LanguageModelArm(sweep_arm.Arm):
    """One model, and how it is trained; the fields are those of `train-lm`.

    Attributes:
        corpus: Name of the data: `"embedded"`, or that of the folder.
        tokens: Of training; a text that has less begins again.
        points: How often it is measured, after equal numbers of tokens.
        validation_tokens: So much of the validation text is read at each point.
        test_tokens: So much of the test text is read at the end, with `--test`.
    """

    vocabulary_size: int = 32_000
    tokens: int = 25_000_000
    num_experts: int = 64
    num_groups: int | None = None
    k: int = K
    hidden_units: int = HIDDEN
    units: int = UNITS
    dropout: float = 0.0
    warmup_steps: int = 200
    batch_size: int = 64
    sequence_length: int = 32
    num_mixtures: int = 1
    num_sampled: int | None = 1024
    untouched_rows: str = "decay"
    points: int = 12
    validation_tokens: int = 100_000
    test_tokens: int = 700_000

    @property
    def steps(self):
        """Steps of training: the last point is at the last full one."""
        return self.tokens // (self.batch_size * self.sequence_length)

    def count(self):
        """A `models.Count` of the model."""
        k = (self.k,) if self.num_groups is None else (self.k, self.k)
        same = ("vocabulary_size", "units", "middle", "num_groups")
        same += ("hidden_units", "shared_units")
        settings = {name: getattr(self, name) for name in same}
        one = models.count(
            models.Preset(
                "arm",
                k=k,
                num_experts=self.num_experts if self.middle == "moe" else 0,
                gating=self.gating,
                noise=self.options_of(TrainLMOptions).noise_stddev,
                **settings,
            )
        )
        several = {"gating": self.num_mixtures, "experts": self.num_mixtures}
        return models.Count(
            *(
                {part: several.get(part, 1) * n for part, n in numbers.items()}
                for numbers in (one.operations, one.parameters)
            )
        )

    def build(self, vocabulary_size):
        """The compiled model."""
        options = self.options_of(TrainLMOptions)
        return train_lm.build_model(options, vocabulary_size, self.middle, self.steps)

    def run(self, folder, corpus, with_test):
        """Trains and measures, from the last point kept in `folder`.

        Returns:
            Dict of figures: `curve` has a point for each measurement.
        """
        start_afresh(self.seed)
        model = self.build(len(corpus.vocabulary))
        corpus = dataclasses.replace(corpus, train=corpus.train[: self.tokens])
        curve = sweep_arm.resume(folder, model)
        shape = self.batch_size, self.sequence_length
        ends = [round(self.steps * i / self.points) for i in range(self.points + 1)]
        for point in range(len(curve), self.points):
            first, last = ends[point], ends[point + 1]
            # Where there is less text than tokens, it begins again.
            stream = corpus.dataset("train", *shape).repeat()
            stream = stream.skip(first).take(last - first)
            clock, cpu = time.perf_counter(), time.process_time()
            logs = model.fit(
                stream,
                epochs=point + 1,
                initial_epoch=point,
                shuffle=False,
                verbose=0,
                callbacks=[runs.NoiseOfEpoch()],
            ).history
            seconds = time.perf_counter() - clock, time.process_time() - cpu
            measured = evaluate(model, corpus.valid[: self.validation_tokens], corpus)
            curve.append(
                {
                    "tokens": last * math.prod(shape),
                    "perplexity": measured["perplexity"],
                    "training_loss": logs["loss"][-1],
                    "seconds": round(seconds[0], 1),
                    "cpu_seconds": round(seconds[1], 1),
                    **sweep_arm.of_experts(measured),
                    **sweep_arm.of_experts(
                        {k: v[-1] for k, v in logs.items()}, "training_"
                    ),
                }
            )
            if not math.isfinite(curve[-1]["perplexity"]):
                break
            sweep_arm.keep(folder, model, curve)
            print(
                f"{last * math.prod(shape):>12,} tokens: "
                f"perplexity {curve[-1]['perplexity']:.2f}",
                flush=True,
            )
        results = self.results(curve)
        if with_test:
            measured = evaluate(model, corpus.test[: self.test_tokens], corpus)
            results["test_perplexity"] = measured["perplexity"]
        return results


def evaluate(model, tokens, corpus):
    """The logs of a text."""
    text = dataclasses.replace(corpus, valid=tokens)
    return model.evaluate(
        text.dataset("valid", *EVALUATION_SHAPE), verbose=0, return_dict=True
    )


Arm = LanguageModelArm


def arm_of(name, common):
    """The arm of a name.

    Args:
        name: `moe_E`, `hierarchical_E` (groups of 16), or the dense twin of
            `moe_E`: `dense_E` (one hidden layer), `deep_E` (several), `4xlstm`.
        common: Dict of the settings that all arms share.
    """
    if name == "4xlstm":
        return LanguageModelArm(**{**common, "middle": name})
    match = re.fullmatch(r"(moe|hierarchical|dense|deep)_(\d+)", name)
    if match is None:
        raise SystemExit(
            "`--arms` must be such as moe_64, hierarchical_256, dense_64, deep_64 or "
            f"4xlstm. Received: {name}."
        )
    kind, num_experts = match[1], int(match[2])
    mixture = LanguageModelArm(**{**common, "num_experts": num_experts})
    if kind == "moe":
        return dataclasses.replace(mixture, k=min(mixture.k, num_experts))
    if kind == "hierarchical":
        k = round(mixture.k**0.5)
        return dataclasses.replace(mixture, num_groups=num_experts // 16, k=k)
    return twin(mixture, kind)


def twin(mixture, kind="dense"):
    """The dense arm whose operations are next to those of a mixture."""
    wanted = mixture.count().core_operations

    def dense(size):
        if kind == "dense":
            sizes = {"middle": "moe_1_wide", "k": 1, "hidden_units": size}
        else:
            sizes = {"middle": "moe_1_deep", "hidden_units": size}
        return dataclasses.replace(mixture, **sizes, **sweep_arm.WITHOUT_MIXTURE)

    sizes = range(1, 3 * (mixture.k * mixture.hidden_units + mixture.shared_units))
    return min(
        map(dense, sizes), key=lambda arm: abs(arm.count().core_operations - wanted)
    )


def read_corpus(options, arm):
    """The tokens, kept as arrays in the folder of the sweep after the first time."""
    size, name = arm.vocabulary_size, arm.corpus
    if len(options.data_dir) > 1:
        raise SystemExit("`--data-dir` must be one folder for a language model.")
    folder = options.work / f"{name}_{size}"
    if not (folder / "vocabulary.tsv").exists():
        print(f"Reading {name} ...", flush=True)
        [given] = options.data_dir or [None]
        known = {"tokenizer": "words"} if given else {"min_count": 2}
        corpus = data.load_text_corpus(given, vocabulary_size=size, **known)
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "valid", "test"):
            np.save(folder / f"{split}.npy", corpus.stream(split))
        corpus.vocabulary.save(folder / "vocabulary.tsv")
    splits = {
        split: np.load(folder / f"{split}.npy", mmap_mode="r")
        for split in ("train", "valid", "test")
    }
    vocabulary = data.Vocabulary.load(folder / "vocabulary.tsv")
    return data.TextCorpus(name, "words", vocabulary, **splits)
