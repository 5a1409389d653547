"""Perplexity by tokens: mixtures and dense twins of equal operations, arm by arm.

    python examples/paper/sweep.py --arms dense_64 moe_64 --tokens 2e6
    python examples/paper/sweep.py --data-dir gutenberg --tokens 25e6 --jobs 2 \\
        --arms dense_4 dense_64 dense_256 moe_4 moe_16 moe_64 moe_256 --seeds 0 1 2
    python examples/paper/sweep.py --data-dir gutenberg --tokens 8e6 \\
        --arms dense_64 moe_64 --set learning_rate=0.002 learning_rate=0.004

An arm is one language model and how it is trained. Each runs in a process of its own
with one thread, `--jobs` of them at a time. Everything may be stopped at any time: what
is recorded is not run again, and the arm that was cut goes on where its last point was
kept (with other candidates of the sampled softmax than it would have had). All arms of a
sweep see the same tokens in the same order; choices are to be made on the validation
text, and `--test` reads the test text of what has been chosen.

`dense_64` is the dense twin of `moe_64`: its hidden layer is widened until the
operations of a token (`keras_moe.models.count`, the gate's included) are equal.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from experiment import Records, start_afresh

from keras_moe import data, models, writing
from keras_moe.commands import runs, train_lm
from keras_moe.commands.options import TrainLMOptions

UNITS, HIDDEN, K = 128, 256, 4
# More rows than in training: there is much of it, and the softmax is the full one.
EVALUATION_SHAPE = 32, 32


@dataclasses.dataclass(frozen=True)
class LanguageModelArm:
    """One model, and how it is trained; the fields are those of `train-lm`.

    Attributes:
        corpus: Name of the data: `"embedded"`, or that of the folder.
        points: How often it is measured, after equal numbers of tokens.
        validation_tokens: So much of the validation text is read at each point.
        test_tokens: So much of the test text is read at the end, with `--test`.
    """

    corpus: str = "embedded"
    vocabulary_size: int = 32_000
    tokens: int = 25_000_000
    middle: str = "moe"
    num_experts: int = 64
    num_groups: int | None = None
    k: int = K
    hidden_units: int = HIDDEN
    units: int = UNITS
    shared_units: int = 0
    gating: str = "noisy_top_k"
    noise: str = "learned"
    activation: str = "linear"
    loss_weight: float = 0.01
    dropout: float = 0.0
    learning_rate: float = 0.004
    warmup_steps: int = 200
    decay: str = "cosine"
    batch_size: int = 64
    sequence_length: int = 32
    num_sampled: int | None = 1024
    seed: int = 0
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
        return models.count(
            models.Preset(
                "arm",
                k=k,
                num_experts=self.num_experts if self.middle == "moe" else 0,
                gating=self.gating,
                **settings,
            )
        )

    def build(self, vocabulary_size):
        """The compiled model."""
        names = {field.name for field in dataclasses.fields(TrainLMOptions)}
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k in names}
        options = TrainLMOptions(**{**settings, "epochs": 1})
        return train_lm.build_model(options, vocabulary_size, self.middle, self.steps)

    def run(self, folder, corpus, with_test):
        """Trains and measures, from the last point kept in `folder`.

        Returns:
            Dict of figures: `curve` has a point for each measurement.
        """
        start_afresh(self.seed)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.build(len(corpus.vocabulary))
        corpus = dataclasses.replace(corpus, train=corpus.train[: self.tokens])
        found = runs.checkpoints(folder)
        done = max(found, default=0)
        curve = json.loads((folder / "curve.json").read_text())[:done] if done else []
        if done:
            model.load_weights(found[done])
        shape = self.batch_size, self.sequence_length
        ends = [round(self.steps * i / self.points) for i in range(self.points + 1)]
        for point in range(done, self.points):
            first, last = ends[point], ends[point + 1]
            stream = corpus.dataset("train", *shape).skip(first).take(last - first)
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
                    **of_experts(measured),
                    **of_experts({k: v[-1] for k, v in logs.items()}, "training_"),
                }
            )
            if not math.isfinite(curve[-1]["perplexity"]):
                break
            # The curve first: a point more than there are weights of is cut off.
            writing.write_text(folder / "curve.json", json.dumps(curve))
            runs.save_weights(model, folder / f"epoch_{point + 1}.weights.h5")
            for old in set(runs.checkpoints(folder)) - {point + 1}:
                (folder / f"epoch_{old}.weights.h5").unlink()
            print(
                f"{last * math.prod(shape):>12,} tokens: "
                f"perplexity {curve[-1]['perplexity']:.2f}",
                flush=True,
            )
        count = self.count()
        results = {
            "curve": curve,
            "perplexity": curve[-1]["perplexity"],
            "operations": count.core_operations,
            "parameters": count.core_parameters,
            "training_cpu_seconds": round(sum(p["cpu_seconds"] for p in curve), 1),
        }
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


def of_experts(logs, prefix=""):
    """What the logs say of the mixtures."""
    wanted = ("max_over_mean_load", "load_cv", "choices_kept")
    return {
        prefix + name: float(value)
        for name, value in logs.items()
        if name.endswith(wanted)
    }


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
        # What a dense model has no use for is not to tell its records apart.
        rest = {"num_experts": 0, "loss_weight": 0.0, "shared_units": 0}
        rest |= {"gating": "noisy_top_k", "noise": "learned"}
        return dataclasses.replace(mixture, **sizes, **rest)

    sizes = range(1, 3 * (mixture.k * mixture.hidden_units + mixture.shared_units))
    return min(
        map(dense, sizes), key=lambda arm: abs(arm.count().core_operations - wanted)
    )


def read_corpus(options):
    """The tokens, kept as arrays in the folder of the sweep after the first time."""
    size = options.vocabulary_size
    name = corpus_name(options)
    folder = options.work / f"{name}_{size}"
    if not (folder / "vocabulary.tsv").exists():
        print(f"Reading {name} ...", flush=True)
        known = {"min_count": 2} if options.data_dir is None else {"tokenizer": "words"}
        corpus = data.load_text_corpus(options.data_dir, vocabulary_size=size, **known)
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


def corpus_name(options):
    return "embedded" if options.data_dir is None else options.data_dir.name


def key_of(arm):
    """Name of the folder of an arm."""
    settings = json.dumps(dataclasses.asdict(arm), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return f"{arm.middle}_{arm.num_experts}_{digest}"


def run_here(options):
    """One arm, in this process; its record goes to a file in its folder."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    arm = LanguageModelArm(**json.loads(options.run_arm))
    folder = options.work / key_of(arm)
    results = arm.run(folder, read_corpus(options), options.test)
    writing.write_text(folder / "results.json", json.dumps(results))


def run_all(arms, options, records):
    """Runs what is not recorded, `--jobs` at a time."""

    def is_known(arm):
        known = records.known(arm)
        return known and ("test_perplexity" in known["results"] or not options.test)

    waiting = [(name, arm) for name, arm in arms if not is_known(arm)]
    print(f"{len(arms)} runs, {len(arms) - len(waiting)} of them recorded.", flush=True)
    running = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name, arm = waiting.pop(0)
            folder = options.work / key_of(arm)
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{name}, seed {arm.seed}: begins, see {folder}/log.txt", flush=True)
            arm_of_child = json.dumps(dataclasses.asdict(arm))
            with open(folder / "log.txt", "a") as log:
                child = subprocess.Popen(
                    [*command_of(options), "--run-arm", arm_of_child],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            running[child] = name, arm, folder
        time.sleep(0.2)
        for child in [c for c in running if c.poll() is not None]:
            name, arm, folder = running.pop(child)
            if child.returncode:
                log = (folder / "log.txt").read_text()[-2000:]
                raise SystemExit(f"{name}, seed {arm.seed} failed:\n{log}")
            results = json.loads((folder / "results.json").read_text())
            records.keep(arm, results)
            print(
                f"{name}, seed {arm.seed}: perplexity {results['perplexity']:.2f}, "
                f"{results['training_cpu_seconds']:.0f} CPU seconds",
                flush=True,
            )


def command_of(options):
    given = ["--work", str(options.work), "--vocabulary-size"]
    given += [str(options.vocabulary_size)]
    if options.data_dir is not None:
        given += ["--data-dir", str(options.data_dir)]
    if options.test:
        given.append("--test")
    return [sys.executable, __file__, *given]


def summarize(arms, records):
    """A table: a row for each arm, over its seeds."""
    rows, by_name = [], {}
    for name, arm in arms:
        by_name.setdefault(name, []).append(records.known(arm)["results"])
    final = {
        name: np.mean([r["perplexity"] for r in found])
        for name, found in by_name.items()
    }
    dense = [n for n in final if not n.startswith(("moe", "hierarchical"))]
    best = min(dense, key=final.get, default=None)
    print(
        "\n| arm | seeds | operations | parameters | validation | test | fewer than "
        f"{best or 'dense'} | overtakes at | CPU seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, found in by_name.items():
        spread = np.std([r["perplexity"] for r in found])
        tests = [r["test_perplexity"] for r in found if "test_perplexity" in r]
        overtakes = ""
        if best and name not in dense:
            overtakes = overtaking(mean_curve(found), mean_curve(by_name[best]))
        rows.append(
            [
                name,
                len(found),
                f"{found[0]['operations']:,}",
                f"{found[0]['parameters']:,}",
                f"{final[name]:.2f} (sd {spread:.2f})",
                f"{np.mean(tests):.2f}" if tests else "",
                f"{1 - final[name] / final[best]:.1%}" if best else "",
                overtakes,
                f"{np.mean([r['training_cpu_seconds'] for r in found]):.0f}",
            ]
        )
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    return by_name


def mean_curve(found):
    """Tokens and perplexity, each `(points,)`: the mean over the seeds."""
    tokens = np.array([p["tokens"] for p in found[0]["curve"]])
    perplexities = [[p["perplexity"] for p in r["curve"]] for r in found]
    return tokens, np.mean(perplexities, axis=0)


def overtaking(curve, other):
    """From which point on a curve stays below another."""
    tokens, values = curve
    above = np.flatnonzero(values >= other[1])
    first = above[-1] + 1 if len(above) else 0
    return f"{tokens[first]:,}" if first < len(tokens) else "never"


def draw(path, by_name):
    """Perplexity by tokens, and by the number of experts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    mixtures = {}
    for name, found in by_name.items():
        tokens, values = mean_curve(found)
        is_mixture = name.startswith(("moe", "hierarchical"))
        [line] = left.plot(
            tokens / 1e6, values, "-" if is_mixture else "--", marker=".", label=name
        )
        if is_mixture:
            mixtures[int(name.split("[")[0].split("_")[1]), name] = values[-1]
        else:
            right.axhline(
                values[-1], color=line.get_color(), linestyle="--", label=name
            )
    flat = sorted((e, v) for (e, n), v in mixtures.items() if n.startswith("moe"))
    if flat:
        right.plot(*zip(*flat, strict=True), "o-", label="mixtures, flat")
    grouped = sorted((e, v) for (e, n), v in mixtures.items() if n.startswith("hier"))
    if grouped:
        right.plot(*zip(*grouped, strict=True), "s", label="hierarchical")
    left.set(xlabel="tokens (millions)", ylabel="validation perplexity", yscale="log")
    right.set(xlabel="experts", ylabel="validation perplexity at the end", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"\nPicture: {path}")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", default=["dense_64", "moe_64"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=float, default=2e6, help="of training")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of all arms; a name given several times makes an arm of each value",
    )
    parser.add_argument("--data-dir", type=Path, help="default: the embedded corpus")
    parser.add_argument("--vocabulary-size", type=int, default=32_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--test", action="store_true", help="read the test text, too")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep"))
    parser.add_argument(
        "--records", type=Path, default=Path("runs/sweep/records.jsonl")
    )
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    parser.add_argument("--run-arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.vocabulary_size, options.jobs = 6e3, 1000, 1
        options.arms, options.picture = ["dense_8", "moe_8"], Path("sweep.png")
        options.set = [
            *("units=16", "hidden_units=16", "points=2", "validation_tokens=2000"),
            *("num_sampled=100", "batch_size=8", "test_tokens=2000"),
        ]
        options.test = True
    return options


def arms_of(options):
    """All `(name, arm)` of the command line."""
    values = {}
    for setting in options.set:
        name, _, value = setting.partition("=")
        kinds = {field.name: field for field in dataclasses.fields(LanguageModelArm)}
        if name not in kinds or not value:
            raise SystemExit(
                f"`--set` must be NAME=VALUE, NAME one of {', '.join(kinds)}. Received: "
                f"{setting}."
            )
        with contextlib.suppress(json.JSONDecodeError):  # then it is a word
            value = json.loads(value)
        values.setdefault(name, []).append(value)
    found = {}
    for seed, choice in itertools.product(
        options.seeds, itertools.product(*values.values())
    ):
        common = dict(zip(values, choice, strict=True))
        several = ", ".join(f"{n}={v}" for n, v in common.items() if len(values[n]) > 1)
        common |= {
            "seed": seed,
            "tokens": int(options.tokens),
            "corpus": corpus_name(options),
            "vocabulary_size": options.vocabulary_size,
        }
        for name in options.arms:
            title = f"{name}[{several}]" if several else name
            found[title, seed] = arm_of(name, common)
    return [(name, arm) for (name, _), arm in found.items()]


def main():
    options = parse()
    if options.run_arm:
        return run_here(options)
    arms = arms_of(options)
    records = Records(options.records)
    read_corpus(options)  # once, before the processes
    run_all(arms, options, records)
    by_name = summarize(arms, records)
    if options.picture:
        draw(options.picture, by_name)


if __name__ == "__main__":
    keras.utils.disable_interactive_logging()
    main()
