"""Perplexity by tokens: mixtures and dense twins of equal operations, arm by arm.

    python examples/paper/sweep.py --arms dense_64 moe_64 --tokens 2e6
    python examples/paper/sweep.py --data-dir gutenberg --tokens 25e6 --jobs 2 \\
        --arms dense_4 dense_64 dense_256 moe_4 moe_16 moe_64 moe_256 --seeds 0 1 2
    python examples/paper/sweep.py --data-dir gutenberg --tokens 8e6 \\
        --arms dense_64 moe_64 --set learning_rate=0.002 learning_rate=0.004

Translation, one direction of two kinds of text, and all directions of a folder in one
model; BLEU and perplexity of every test set with `--test`:

    python examples/paper/sweep.py --task translation --data-dir laws-en-fr tatoeba-en6 \\
        --set directions=en-fra steps=8000 --arms dense_32 moe_32 decoder_moe_32 --test
    python examples/paper/sweep.py --task translation --data-dir tatoeba-en6 --test

An arm is one model and how it is trained. Each runs in a process of its own
with one thread, `--jobs` of them at a time. Everything may be stopped at any time: what
is recorded is not run again, and the arm that was cut goes on where its last point was
kept (with other candidates of the sampled softmax than it would have had). All arms of a
sweep see the same tokens in the same order; choices are to be made on the validation
text, and `--test` reads the test text of what has been chosen.

`dense_64` is the dense twin of `moe_64`: its hidden layer is widened until the
operations of a token (`keras_moe.models.count`, the gate's included) are equal. So is
the dense expert on the other side of `decoder_moe_32`.

    python examples/paper/sweep.py --report records.jsonl --picture sweep.png

prints the tables of a file of records, and runs nothing. In a document beside the file
they stand between `<!-- tables of records.jsonl -->` and `<!-- end of tables -->`, where
a test compares them (`tests/examples/test_sweep.py`).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import sweep_language
import sweep_report
import sweep_translation
import tensorflow as tf
from experiment import BEFORE, Records

from keras_moe import writing

TASKS = {"language": sweep_language, "translation": sweep_translation}


def key_of(arm):
    """Name of the folder of an arm."""
    settings = dataclasses.asdict(arm)
    before = BEFORE.get(type(arm).__name__, {})
    settings = {
        name: value
        for name, value in settings.items()
        if name not in arm.TEST_ONLY and not (name in before and before[name] == value)
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{arm.middle}_{arm.num_experts}_{digest[:12]}"


def run_here(options):
    """One arm, in this process; its record goes to a file in its folder."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    task = TASKS[options.task]
    arm = task.Arm(**json.loads(options.run_arm))
    folder = options.work / key_of(arm)
    results = arm.run(folder, task.read_corpus(options, arm), options.test)
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
            records.keep(arm, results, name=name)
            print(
                f"{name}, seed {arm.seed}: perplexity {results['perplexity']:.2f}, "
                f"{results['training_cpu_seconds']:.0f} CPU seconds",
                flush=True,
            )


def command_of(options):
    given = ["--work", str(options.work), "--task", options.task]
    if options.data_dir:
        given += ["--data-dir", *map(str, options.data_dir)]
    if options.test:
        given.append("--test")
    return [sys.executable, __file__, *given]


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="language")
    parser.add_argument(
        "--arms", nargs="+", help="default: a mixture and its dense twin"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--tokens", type=float, help="of training of a language model; default: 2e6"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of all arms; a name given several times makes an arm of each value",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="folder, of translation also several; default: the embedded corpus",
    )
    parser.add_argument("--vocabulary-size", type=int, help="most words or subwords")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--test", action="store_true", help="read the test text, too")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep"))
    parser.add_argument(
        "--records", type=Path, default=Path("runs/sweep/records.jsonl")
    )
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument(
        "--report", type=Path, help="file of records, of which to print the tables"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    parser.add_argument("--run-arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.arms = options.arms or TASKS[options.task].ARMS
    if options.quick:
        options.arms, options.jobs = TASKS[options.task].QUICK_ARMS, 2
        options.picture, options.test = Path("sweep.png"), True
    return options


def given_settings(options):
    """Dict of setting to its values, by `--set` and options of their own."""
    fields = dataclasses.fields(TASKS[options.task].Arm)
    kinds = {field.name: field.type for field in fields}
    values = {}
    for setting in options.set:
        name, _, value = setting.partition("=")
        if name not in kinds or not value:
            raise SystemExit(
                f"`--set` must be NAME=VALUE, NAME one of {', '.join(kinds)}. Received: "
                f"{setting}."
            )
        with contextlib.suppress(json.JSONDecodeError):  # then it is a word
            value = json.loads(value)
        value = int(value) if kinds[name] is int else value  # 2e6
        values.setdefault(name, []).append(value)
    if options.task == "language":
        values.setdefault("tokens", [int(options.tokens or 2e6)])
    elif options.tokens:
        raise SystemExit("`--tokens` is for a language model. Use --set steps=8000.")
    if options.vocabulary_size:
        values["vocabulary_size"] = [options.vocabulary_size]
    if options.quick:
        values |= {name: [v] for name, v in TASKS[options.task].QUICK.items()}
    names = [folder.name for folder in options.data_dir]
    values["corpus"] = ["+".join(names) or "embedded"]
    return values


def arms_of(options):
    """All `(name, arm)` of the command line."""
    values = given_settings(options)
    found = []
    for seed, choice in itertools.product(
        options.seeds, itertools.product(*values.values())
    ):
        common = {**dict(zip(values, choice, strict=True)), "seed": seed}
        for name in options.arms:
            arm = (name, TASKS[options.task].arm_of(name, common))
            if arm not in found:
                found.append(arm)
    return found


def report(records, picture):
    """Prints the tables of records, and draws the picture that is asked for."""
    print("\n" + sweep_report.tables(records))
    if picture:
        sweep_report.draw(picture, records)


def main():
    options = parse()
    if options.report:
        if not options.report.exists():
            raise SystemExit(f"`--report` must be a file. Received: {options.report}.")
        return report(Records(options.report).all(), options.picture)
    if options.run_arm:
        return run_here(options)
    arms = arms_of(options)
    records = Records(options.records)
    # Once, before the processes.
    TASKS[options.task].read_corpus(options, arms[0][1])
    run_all(arms, options, records)
    report([records.known(arm) for _, arm in arms], options.picture)


if __name__ == "__main__":
    keras.utils.disable_interactive_logging()
    main()
