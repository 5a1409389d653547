"""Trains a language model, measures it, saves it, and shows what it does."""

import csv
import json
import math
import shutil
import time
from pathlib import Path

import keras
import numpy as np

from keras_moe import data, models, serving, telemetry
from keras_moe.commands import pictures
from keras_moe.commands.options import TrainLMOptions
from keras_moe.optimizers import WarmupInverseSquareRoot

_SETTINGS, _HISTORY, _MODEL = "settings.json", "history.csv", "model.keras"
_WEIGHTS, _BACKUP = "best.weights.h5", "checkpoint"
# Evaluation streams: few rows, so that little text begins from zero state.
_EVALUATION_BATCH_SIZE = 8


def run(options: TrainLMOptions) -> dict:
    """Runs the whole job and prints a report.

    Args:
        options: See `TrainLMOptions`.

    Returns:
        The figures of the report, by name; also in `report.json`.

    Raises:
        ValueError: An option is out of range, or `output_dir` holds a run with
            other settings.
        FileNotFoundError: `data_dir` or one of its files is missing.
    """
    _verify(options)
    print("Reading the text ...", flush=True)
    corpus = data.load_text_corpus(
        options.data_dir,
        tokenizer=options.tokenizer,
        vocabulary_size=options.vocabulary_size,
        min_count=options.min_count,
    )
    print(
        f"{corpus.name}: {corpus.train.size:,} training, {corpus.valid.size:,} "
        f"validation and {corpus.test.size:,} test tokens, vocabulary of "
        f"{len(corpus.vocabulary):,}."
    )
    folder = _prepare_folder(options)
    corpus.vocabulary.save(folder / "vocabulary.tsv")
    model, seconds = _train(options, corpus, folder, options.middle)
    report = _evaluate(model, corpus, options)
    report["training_seconds"] = round(seconds, 1)
    if options.baseline and options.middle == "moe":
        print("\nThe dense baseline of equal operations (one wide expert):")
        dense, seconds = _train(options, corpus, folder / "baseline", "moe_1_wide")
        figures = _evaluate(dense, corpus, options)
        for name in ("test_perplexity", "valid_perplexity"):
            report[f"baseline_{name}"] = figures[name]
        report["baseline_training_seconds"] = round(seconds, 1)
    model.save(folder / _MODEL)
    saved_model = serving.export(model, folder / "saved_model")
    written = pictures.draw_history(_read_history(folder), folder / "loss.png")
    if "expert_counts" in report:
        counts = np.array(report["expert_counts"])
        written += pictures.draw_load(counts, folder / "expert_load.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _print_report(report)
    _print_files(folder, saved_model, written)
    _show_reloaded(folder / _MODEL, corpus, options)
    return report


def _verify(options):
    for name in ("epochs", "patience", "batch_size", "sequence_length", "warmup_steps"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"`{name}` must be at least 1. Received: {name}="
                f"{getattr(options, name)}."
            )
    if not options.learning_rate > 0:
        raise ValueError(
            "`learning_rate` must be greater than 0. "
            f"Received: learning_rate={options.learning_rate}."
        )


def _prepare_folder(options) -> Path:
    """Makes the output folder, or finds an earlier run of the same settings."""
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"`output_dir` must be a folder. Received: {str(folder)!r}, a file."
        )
    path = folder / _SETTINGS
    if options.overwrite and path.exists():
        shutil.rmtree(folder)
    if path.exists():
        _verify_settings(json.loads(path.read_text()), options.settings(), folder)
        if (folder / _BACKUP).exists():
            print(f"Going on with the interrupted run in {folder}.")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            "`output_dir` must be new, empty, or an earlier run. Received: "
            f"{str(folder)!r}, which holds other files. Choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(options.settings(), indent=2) + "\n")
    return folder


def _verify_settings(old, new, folder):
    differing = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    if differing:
        listed = ", ".join(
            f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in sorted(differing)
        )
        raise ValueError(
            f"`output_dir` holds a run with other settings. Received: {str(folder)!r} "
            f"({listed}). Use the same settings to go on with it, another "
            "`output_dir`, or `overwrite` (--overwrite) to start again."
        )


def build_model(
    options: TrainLMOptions, vocabulary_size: int, middle: str
) -> models.MoELanguageModel:
    """The compiled language model that the options describe."""
    model = models.MoELanguageModel(
        vocabulary_size,
        options.units,
        middle=models.middle_layers(
            middle,
            units=options.units,
            hidden_units=options.hidden_units,
            num_experts=options.num_experts,
            k=options.k,
            loss_weight=options.loss_weight,
        ),
        lstm_units=options.lstm_units,
        dropout=options.dropout,
        stateful=True,
        num_sampled=options.num_sampled,
    )
    model.build((options.batch_size, options.sequence_length))
    model.compile(
        keras.optimizers.Adam(
            WarmupInverseSquareRoot(options.learning_rate, options.warmup_steps),
            global_clipnorm=1.0,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[telemetry.Perplexity()],
    )
    # Now and not in the first step, so that a file saved before it is complete.
    model.optimizer.build(model.trainable_variables)
    return model


def _train(options, corpus, folder, middle):
    """Trains, or loads what an earlier run has trained to the end."""
    folder.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(options.seed)
    model = build_model(options, len(corpus.vocabulary), middle)
    train = corpus.dataset("train", options.batch_size, options.sequence_length)
    finished = folder / "finished.json"
    if finished.exists():
        print(f"{folder} holds a trained model; --overwrite trains it again.")
        model.load_weights(folder / _WEIGHTS)
        return model, json.loads(finished.read_text())["training_seconds"]
    history = _read_history(folder)
    best = min((row["val_perplexity"] for row in history), default=math.inf)
    seconds = sum(row["seconds"] for row in history)
    print(
        f"{model.name}: {model.count_params():,} parameters; "
        f"{len(train):,} steps an epoch, at most {options.epochs} epochs."
    )
    _fit(
        model,
        train,
        _evaluation_stream(corpus, "valid", options),
        options,
        folder,
        best,
    )
    seconds = sum(row["seconds"] for row in _read_history(folder))
    finished.write_text(json.dumps({"training_seconds": seconds}) + "\n")
    shutil.rmtree(folder / _BACKUP, ignore_errors=True)
    model.load_weights(folder / _WEIGHTS)
    return model, seconds


def _fit(model, train, valid, options, folder, best):
    # A run that goes on measures itself against its best epoch before.
    known = {} if math.isinf(best) else {"baseline": best}
    model.fit(
        train,
        validation_data=valid,
        epochs=options.epochs,
        shuffle=False,
        verbose=options.verbose,
        callbacks=[
            keras.callbacks.ModelCheckpoint(
                folder / _WEIGHTS,
                monitor="val_perplexity",
                mode="min",
                save_best_only=True,
                save_weights_only=True,
                initial_value_threshold=best,
            ),
            _NoiseOfEpoch(),
            _History(folder / _HISTORY),
            keras.callbacks.BackupAndRestore(
                folder / _BACKUP, double_checkpoint=True, delete_checkpoint=False
            ),
            keras.callbacks.EarlyStopping(
                "val_perplexity", patience=options.patience, mode="min", **known
            ),
        ],
    )


class _NoiseOfEpoch(keras.callbacks.Callback):
    """Sets the random generators of the layers to what belongs to an epoch.

    Keras does not save their states. With the epoch in their counters a run that
    goes on after an interruption draws the noise it would have drawn without.
    """

    def on_epoch_begin(self, epoch, logs=None):
        for variable in self.model.variables:
            if variable.path.endswith("seed_generator_state"):
                seed = keras.ops.convert_to_numpy(variable)[0]
                variable.assign([seed, epoch << 20])


class _History(keras.callbacks.Callback):
    """Appends the logs of every epoch to a CSV file, with its time."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch, "seconds": time.perf_counter() - self._start, **logs}
        # An epoch whose checkpoint was not written before an interruption runs
        # again: its row is replaced.
        rows = [r for r in _read_history(self.path.parent) if r["epoch"] < epoch]
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows([*rows, row])


def _read_history(folder):
    path = folder / _HISTORY
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _evaluation_stream(corpus, split, options):
    return corpus.dataset(split, _EVALUATION_BATCH_SIZE, options.sequence_length)


def _evaluate(model, corpus, options):
    """Perplexities, and the experts' load as true counts over the test text."""
    report = {"unigram_test_perplexity": 0.0}
    for split in ("valid", "test"):
        logs = model.evaluate(
            _evaluation_stream(corpus, split, options), verbose=0, return_dict=True
        )
        report[f"{split}_perplexity"] = logs["perplexity"]
    report["unigram_test_perplexity"] = data.unigram_perplexity(
        corpus.vocabulary, corpus.test
    )
    report["unknown_in_test"] = float(np.mean(corpus.test == 1))
    for layer in model.moe_layers:
        if layer.num_experts > 1:
            report["max_over_mean_load"] = logs[f"{layer.name}_max_over_mean_load"]
            report["load_cv"] = logs[f"{layer.name}_load_cv"]
            report["expert_counts"] = layer.balance.counts().numpy().tolist()
    return report


def _print_report(report):
    print("\nPerplexity over all tokens, end of sentence included:")
    rows = [("validation", "valid_perplexity"), ("test", "test_perplexity")]
    if "baseline_test_perplexity" in report:
        rows.append(("test, dense of equal operations", "baseline_test_perplexity"))
    rows.append(("test, unigram frequencies", "unigram_test_perplexity"))
    for title, key in rows:
        print(f"  {title:<34}{report[key]:9.1f}")
    print(f"  ({report['unknown_in_test']:.1%} of the test tokens are <unk>)")
    if "max_over_mean_load" in report:
        print(
            "Load of the experts on the test text, true counts: "
            f"max/mean {report['max_over_mean_load']:.2f}, CV {report['load_cv']:.2f}."
        )
    print(f"Training took {report['training_seconds']:.0f} s.")


def _print_files(folder, saved_model, written):
    print("\nFiles:")
    rows = [
        (folder / _MODEL, "the model, for keras.saving.load_model"),
        (saved_model, "SavedModel, for tf.saved_model.load and TF Serving"),
        (folder / "vocabulary.tsv", "tokens in the order of their ids, with counts"),
        (folder / _HISTORY, "the logs of every epoch"),
        (folder / "report.json", "the figures above"),
        *((path, text) for path, text in written),
    ]
    for path, text in rows:
        print(f"  {path!s:<44} {text}")


def _show_reloaded(path, corpus, options):
    """Samples from the model as it was saved, and shows its experts at work."""
    model = keras.saving.load_model(path)
    vocabulary = corpus.vocabulary
    prompt = vocabulary.encode(["<eos>"])[np.newaxis]
    print("\nSampled from the reloaded model:")
    for seed in range(3):
        sample = model.generate(
            prompt,
            40,
            temperature=0.8,
            seed=options.seed + seed,
            forbidden_tokens=(0, 1),
        )[0, 1:]
        sentence = vocabulary.to_text(sample).split("\n")[0]
        print(f"  {sentence}")
    tokens = corpus.test[np.newaxis, :12]
    for name, (experts, gates) in model.routing(tokens).items():
        if gates.shape[-1] == 1:
            continue
        print(f"\nWhich experts of {name!r} take a token, and with what gate:")
        words = vocabulary.decode(tokens[0])
        for word, row, weights in zip(words, experts[0], gates[0], strict=True):
            listed = "  ".join(
                f"{e:>3} ({g:.2f})" for e, g in zip(row, weights, strict=True)
            )
            print(f"  {word:<14} {listed}")
