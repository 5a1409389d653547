"""What the experts of the sweep's mixtures stand for (table 9): words, books, test sets.

    python examples/paper/what_experts_do.py --records records.jsonl --work runs/sweep \\
        --data-dir gutenberg
    python examples/paper/what_experts_do.py --task translation --records records.jsonl \\
        --work runs/sweep --data-dir laws-en-fr tatoeba-en6

Takes the mixtures of a file of records of `sweep.py` whose weights are still in its
`--work`, and shows them test text, without noise. For a language model: the words
that every expert takes with the largest gates, in a folder for each arm, and the mutual
information of the choice of expert and the word, the word before, and the book. For a
translation model: that of the choice and the test set that a pair is from. Beside each the
largest of 20 shuffles of the labels, what chance gives. `--quick` trains a tiny mixture first.
"""

import argparse
import dataclasses
import math
import os
from importlib import resources
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import sweep
import sweep_arm
import sweep_language
import sweep_translation
import tensorflow as tf
from experiment import Records

from keras_moe import data, telemetry
from keras_moe.data.files import read_lines
from keras_moe.data.text import tokenize
from keras_moe.layers.routing_record import recorded_routing, routing_tensors

ROWS, LENGTH = 32, 64  # of a batch of a language model
# Words of a label of their own; all others are one more.
FREQUENT = 200
HEADER = (
    "| arm | layer | label | information (nats) | of at most | shuffled, largest |\n"
    "|---|---|---|---|---|---|"
)


def books_of(data_dir, vocabulary):
    """Ids of each book of the test text: blank lines stand between them."""
    embedded = resources.files("keras_moe.data") / "corpora" / "austen.test.txt.xz"
    path = next(data_dir.glob("test.txt*")) if data_dir else embedded
    books, ids = [], []
    for line in read_lines(path):
        words = tokenize(line, "words")
        if words:
            ids.append(vocabulary.encode([*words, data.EOS]))
        elif ids:
            books.append(np.concatenate(ids))
            ids = []
    return [*books, np.concatenate(ids)] if ids else books


def rows_of(books, most):
    """Rows of one length from all over each book, and the number of each one's book."""
    rows, labels = [], []
    for number, ids in enumerate(books):
        own = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        step = max(1, math.ceil(len(own) / most))
        rows.append(own[::step])
        labels.append(np.full(len(own[::step]), number))
    rows, labels = np.concatenate(rows), np.concatenate(labels)
    # All batches have one shape; the rows left out are drawn from all books.
    order = np.random.default_rng(0).permutation(len(rows))
    order = order[: max(1, len(rows) // ROWS) * ROWS]
    return rows[order], labels[order]


def language_model(arm, folder, options):
    """Lines of the table of one arm."""
    corpus = sweep_language.read_corpus(options, arm)
    model = arm.build(len(corpus.vocabulary))
    model(np.zeros((ROWS, LENGTH), "int32"))
    sweep_arm.resume(folder, model)
    data_dir = options.data_dir[0] if options.data_dir else None
    rows, books = rows_of(books_of(data_dir, corpus.vocabulary), options.rows)
    names = np.array(["", *corpus.vocabulary.tokens[1:]], dtype=object)
    frequent = np.minimum(np.arange(len(names)), FREQUENT)
    batches = [
        (rows[i : i + ROWS], books[i : i + ROWS]) for i in range(0, len(rows), ROWS)
    ]

    def call(model, batch):
        model.reset_state()
        return model(batch[0], training=False)

    def before(batch):
        return np.pad(frequent[batch[0]], [[0, 0], [1, 0]])[:, :-1]

    labels = {
        "word": lambda batch: frequent[batch[0]],
        "word before": before,
        "book": lambda batch: batch[1],
    }
    lines = []
    for label, of in labels.items():
        shown = telemetry.ExpertSpecialization(
            batches,
            words=lambda batch: names[batch[0]],
            labels=of,
            label_name=label,
            call=call,
        )
        found = shown.analyze(model)
        if label == "word":
            shown.write(found, options.output / sweep.key_of(arm))
        for layer, contexts in found.items():
            lines.append((layer, label, contexts.information))
    return lines


def translation_model(arm, folder, options):
    """Lines of the table of one arm."""
    corpus = sweep_translation.read_corpus(options, arm)
    model = arm.build(corpus.vocabulary)
    sweep_arm.resume(folder, model)
    sets = sweep_translation.Sets(arm, corpus, "test", options.rows * 10)
    mixtures = [layer for layer in model.moe_layers if layer.num_experts > 1]
    counts = {layer.name: [] for layer in mixtures}
    labels = []
    for number, batches in enumerate(sets.batches.values()):
        for inputs, *_ in batches:
            with recorded_routing(mixtures) as records:
                model(inputs, training=False)
            for layer in mixtures:
                experts = routing_tensors(records[layer.name][0])[0].numpy()
                counts[layer.name] += [
                    np.bincount(row[row >= 0], minlength=layer.num_experts)
                    for row in experts.reshape(len(experts), -1)
                ]
            labels += [number] * len(experts)
    return [
        (
            name,
            "test set",
            telemetry.label_information(
                np.stack(own), np.array(labels), len(sets.batches)
            ),
        )
        for name, own in counts.items()
    ]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(sweep.TASKS), default="language")
    parser.add_argument("--records", type=Path, help="file that sweep.py has written")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep"))
    parser.add_argument(
        "--data-dir", type=Path, nargs="+", default=[], help="as of sweep.py"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/experts"))
    parser.add_argument(
        "--rows", type=int, default=100, help="of each book, at most; 10 pairs a row"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    options = parser.parse_args()
    if not options.quick and options.records is None:
        parser.error("`--records` is needed: a file that sweep.py has written.")
    return options


def arms_of(options):
    """The mixtures of the records by their names."""
    task = sweep.TASKS[options.task]
    if options.quick:
        options.work, options.rows = Path("sweep"), 4
        arm = task.arm_of(task.QUICK_ARMS[1], {**task.QUICK, "corpus": "embedded"})
        corpus = task.read_corpus(options, arm)
        arm.run(options.work / sweep.key_of(arm), corpus, with_test=False)
        return {task.QUICK_ARMS[1]: arm}
    fields = {field.name for field in dataclasses.fields(task.Arm)}
    found = {}
    for record in Records(options.records).all():
        arm = task.Arm(**{k: v for k, v in record["arm"].items() if k in fields})
        if arm.num_experts:
            found[f"{record['name']}, seed {arm.seed}"] = arm
    return found


def main():
    options = parse()
    tf.config.threading.set_inter_op_parallelism_threads(1)
    analyze = {"language": language_model, "translation": translation_model}
    print(HEADER)
    for name, arm in arms_of(options).items():
        folder = options.work / sweep.key_of(arm)
        if not any(folder.glob("*.weights.h5")):
            print(f"({name}: no weights in {folder})")
            continue
        for layer, label, found in analyze[options.task](arm, folder, options):
            print(
                f"| {name} | {layer} | {label} | {found.information:.3f} "
                f"| {math.log(min(found.counts.shape)):.2f} | {max(found.shuffled):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    keras.utils.disable_interactive_logging()
    main()
