"""What all experiments share: options, records of runs, tables, checks.

An experiment is a script with a plan and checks:

    experiment.main(
        __doc__,
        plan=...,     # seed, cause left out -> dict of title to arm
        check=...,    # results by title -> dict of statement to whether it holds
        columns=...,  # which results the table shows
        causes=...,   # causes that `--without` takes away, each with what then happens
    )

An arm is a frozen dataclass with a method `run() -> dict` of JSON values. Its fields
say everything that decides the result, so a result is kept, as one line of JSON, and
found again by this or another script: experiments share runs, and an interrupted
experiment goes on where it was.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

import keras_moe


class Records:
    """Results of runs, one line of JSON each.

    Args:
        path: Path of the file.
    """

    def __init__(self, path):
        self.path = path
        self._known = {}
        if path.exists():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self._known[_key(record["arm"])] = record

    def known(self, arm):
        """The record of an arm, None if there is none."""
        return self._known.get(_key(_settings(arm)))

    def all(self):
        """All records, one for each arm."""
        return list(self._known.values())

    def result(self, arm, again=False):
        """The record of an arm, which is run if there is none."""
        if not again and self.known(arm):
            return self.known(arm)
        start, cpu = time.perf_counter(), time.process_time()
        results = arm.run()
        return self.keep(
            arm,
            results,
            seconds=round(time.perf_counter() - start, 1),
            cpu_seconds=round(time.process_time() - cpu, 1),
        )

    def keep(self, arm, results, **more):
        """Adds the record of an arm, in place of one that there is; `more` goes in."""
        record = {
            "arm": _settings(arm),
            "results": results,
            **more,
            "versions": versions(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self._known[_key(_settings(arm))] = record
        return record


def _settings(arm):
    return {"kind": type(arm).__name__, **dataclasses.asdict(arm)}


# What an arm had before there was a setting for it: what is recorded stays valid.
BEFORE = {
    "LanguageModelArm": {
        "shared_units": 0,
        "expert_dropout": 0.0,
        "scaling_factor": 1.0,
        "expert_learning_rate": 1.0,
        "gate_learning_rate": 1.0,
        "num_mixtures": 1,
        "untouched_rows": "keep",
    }
}


def _key(settings):
    before = BEFORE.get(settings["kind"], {})
    return json.dumps({**before, **settings}, sort_keys=True)


def versions():
    """Of all that takes part."""
    return {
        "keras_moe": keras_moe.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }


def parse(doc, causes):
    """The options of every experiment."""
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="causes for --without:\n"
        + "\n".join(f"  {name}: {text}" for name, text in causes.items()),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--without",
        choices=list(causes),
        help="take away what a check is about; the check must then fail",
    )
    parser.add_argument(
        "--records",
        type=Path,
        default=Path("runs/paper/records.jsonl"),
        help="file of results, read and added to; default: %(default)s",
    )
    parser.add_argument(
        "--more", action="store_true", help="also the arms that no check needs"
    )
    parser.add_argument("--again", action="store_true", help="run what is recorded too")
    parser.add_argument("--picture", type=Path, help="PNG to draw, where there is one")
    parser.add_argument(
        "--threads", type=int, help="threads of TensorFlow; default: its own choice"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a short run of one seed, for a test; checks are shown and count nothing",
    )
    return parser.parse_args()


def main(doc, *, plan, check, columns, causes, more=None, draw=None):
    """Runs an experiment from the command line.

    Args:
        doc: Docstring of the script, for `--help`.
        plan: Function of a seed and a cause left out (or None): dict of title to arm.
        check: Function of one seed's results, by title: dict of statement to bool.
        columns: Dict of the key of a result to the format it is shown with.
        causes: Dict of name to what happens without it.
        more: Function of a seed: dict of title to arm, with `--more`; or None.
        draw: Function of axes and all results, `{seed: {title: result}}`, or None.

    Raises:
        SystemExit: With status 1 if a check failed.
    """
    options = parse(doc, causes)
    if options.threads:
        tf.config.threading.set_intra_op_parallelism_threads(options.threads)
        tf.config.threading.set_inter_op_parallelism_threads(options.threads)
    if options.quick:
        options.seeds = options.seeds[:1]
    records = Records(options.records)
    print(", ".join(f"{name} {text}" for name, text in versions().items()))
    if options.without:
        print(f"Without {options.without}: {causes[options.without]}.")
    print_header(columns)
    everything, checks = {}, {}
    for seed in options.seeds:
        everything[seed] = {}
        arms = plan(seed, options.without)
        if options.more and more:
            arms |= more(seed)
        for title, arm in arms.items():
            arm = arm.shortened() if options.quick else arm
            record = records.result(arm, options.again)
            everything[seed][title] = record["results"]
            print_row(seed, title, record, columns)
        found = check(everything[seed])
        checks |= {f"seed {seed}: {text}": passed for text, passed in found.items()}
    if options.picture and draw:
        draw_picture(options.picture, draw, everything)
    report_checks(checks, enforced=not options.quick)


def print_header(columns):
    titles = ["seed", "arm", *(key.replace("_", " ") for key in columns), "seconds"]
    print("\n| " + " | ".join(titles) + " |")
    print("|---" * len(titles) + "|", flush=True)


def print_row(seed, title, record, columns):
    results = record["results"]
    cells = [
        format(results[key], style) if results.get(key) is not None else ""
        for key, style in columns.items()
    ]
    cells = [str(seed), title, *cells, f"{record['seconds']:.0f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def report_checks(checks, enforced):
    """Prints what holds and what does not; the process fails with a check."""
    print()
    for text, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED'}: {text}")
    if enforced and not all(checks.values()):
        raise SystemExit(1)


def draw_picture(path, draw, everything):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    draw(figure.subplots(), everything)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"\nPicture: {path}")


def start_afresh(seed):
    """A clean Keras with all its seeds set."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
