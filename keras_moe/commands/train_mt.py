"""Trains a translation model, scores it, saves it, and shows what it does."""

import math
import time
from pathlib import Path

import keras

from keras_moe import checks, data, models, serving, telemetry, writing
from keras_moe.commands import compiling, folders, pairs, pictures, runs
from keras_moe.commands.language_experts import (
    experts_by_language,
    information_report,
)
from keras_moe.commands.options import TrainMTOptions
from keras_moe.data.translation import split_direction, target_inputs

_COUNTS = ("epochs", "patience", "warmup_steps", "num_beams", "max_length")
_VOCABULARY, REPORT = "subwords.model", "report.json"


def run(options: TrainMTOptions) -> dict:
    """Runs the whole job and prints a report.

    Args:
        options: See `TrainMTOptions`.

    Returns:
        The figures of the report, by name; also in `report.json`.

    Raises:
        ImportError: A library that is needed is not installed.
        ValueError: An option is out of range, or `output_dir` holds a run with
            other settings.
        FileNotFoundError: `data_dir` or one of its files is missing.
    """
    _verify_options(options)
    folder = Path(options.output_dir)
    folders.check_folder(options, folder)
    print("Reading the pairs ...", flush=True)
    directions = None if options.directions is None else options.directions.split(",")
    corpus = _corpus(options, directions)
    for split in ("train", "valid", "test"):
        sizes = ", ".join(
            f"{d} {len(s):,}" for d, (s, _) in corpus.pairs[split].items()
        )
        print(f"{corpus.name}, {split} pairs: {sizes}")
    pairs.verify_pairs(corpus)
    vocabulary = _vocabulary(corpus, options, folder)
    print(f"Subwords of all languages: {len(vocabulary):,}.", flush=True)
    print("Encoding the pairs ...", flush=True)
    keras.utils.set_random_seed(options.seed)
    batches = {
        split: pairs.epoch_batches(corpus, split, vocabulary, options)
        for split in ("train", "valid", "test")
    }
    steps = batches["train"][1] * options.epochs
    model = _build(options, vocabulary, options.middle, steps)
    folders.prepare_folder(options, folder)
    with writing.written_beside(folder / _VOCABULARY) as partial:
        partial.write_bytes(vocabulary.model)
    seconds = _train(model, options, corpus, batches, folder)
    report = _evaluate(model, corpus, batches, options, folder)
    report["training_seconds"] = round(seconds, 1)
    if options.baseline and options.middle == "moe":
        print("\nThe dense baseline of equal operations (one wide expert a mixture):")
        dense_folder = folder / "baseline"
        dense = _build(options, vocabulary, "moe_1_wide", steps)
        # Afresh, for a dataset that is gone through again has another order.
        batches["train"] = pairs.epoch_batches(
            corpus, "train", vocabulary, options, show=False
        )
        seconds = _train(dense, options, corpus, batches, dense_folder)
        report["baseline"] = _evaluate(dense, corpus, batches, options, dense_folder)
        report["baseline"]["training_seconds"] = round(seconds, 1)
    print("Saving and exporting ...", flush=True)
    folders.save_model(model, folder)
    saved_model = serving.export(model, folder / "saved_model")
    print("Drawing attention and experts ...", flush=True)
    written = _draw(model, corpus, options, report, folder)
    folders.write_json(folder / REPORT, report)
    _print_report(report)
    runs.print_files(
        [
            (folder / folders.MODEL, "the model, for keras.saving.load_model"),
            (saved_model, "SavedModel with the signature translate, for TF Serving"),
            (folder / _VOCABULARY, "the subwords, a sentencepiece model"),
            (folder / folders.HISTORY, "the logs of every epoch"),
            (folder / REPORT, "the figures above, and the translations"),
            *written,
            *runs.usage_files(folder),
        ]
    )
    return report


def _corpus(options, directions):
    if options.tfds is None:
        return data.load_translation_corpus(options.data_dir, directions=directions)
    return data.load_tfds_translation(
        options.tfds,
        directions=directions,
        data_dir=options.data_dir,
        max_pairs=options.max_pairs,
    )


def _vocabulary(corpus, options, folder):
    """Learns the subwords, or takes those of the run that goes on."""
    path = folder / _VOCABULARY
    languages = corpus.target_languages
    if path.exists() and not options.overwrite:
        return folders.read_whole(
            path,
            lambda: data.SubwordVocabulary(path.read_bytes(), languages),
            "Delete it, and the same command learns it again from the same pairs.",
        )
    print("Learning subwords ...", flush=True)
    return data.SubwordVocabulary.learn(
        corpus.texts("train"), options.vocabulary_size, languages
    )


def build_model(
    options: TrainMTOptions,
    vocabulary: data.SubwordVocabulary,
    middle: str,
    steps: int,
    dense_units: int | None = None,
) -> models.MoETranslator:
    """The compiled translation model that the options describe.

    Args:
        options: Those of the command.
        vocabulary: Of the pairs.
        middle: That of the options, or `"moe_1_wide"` for the dense model of equal
            operations.
        steps: Of the whole training.
        dense_units: Hidden units of a dense expert. Defaults to those of the experts
            that a token meets.
    """
    without = {"encoder": "decoder", "decoder": "encoder"}.get(options.mixtures)
    sides = {
        side: _middle(
            options,
            "moe_1_wide" if middle == "moe" and side == without else middle,
            dense_units,
            f"{side}_moe",
        )
        for side in ("encoder", "decoder")
    }
    model = models.MoETranslator(
        len(vocabulary),
        options.units,
        encoder_middle=sides["encoder"],
        decoder_middle=sides["decoder"],
        lstm_units=options.lstm_units,
        dropout=options.dropout,
        vocabulary=vocabulary,
    )
    model.build([(None, None), (None, None)])
    schedule = compiling.learning_rate(options, steps)
    optimizer = compiling.make_optimizer(options, model, schedule, global_clipnorm=5.0)
    compiling.compile_model(model, optimizer)
    return model


def _middle(options, kind, dense_units, name):
    sizes = {
        "hidden_units": options.hidden_units,
        "shared_units": options.shared_units,
        "k": (options.k,) if options.num_groups is None else (options.k, options.k),
        "num_groups": options.num_groups,
    }
    if kind == "moe_1_wide" and dense_units is not None:
        sizes = {"hidden_units": dense_units, "k": (1,)}
    return models.translation_middle(
        kind,
        units=options.units,
        num_experts=options.num_experts,
        gating=options.gating,
        loss_weight=options.loss_weight,
        noise=options.noise_stddev,
        activation=options.activation,
        expert_dropout=options.expert_dropout,
        scaling_factor=options.scaling_factor,
        name=name,
        **sizes,
    )


def _verify_options(options):
    runs.verify_numbers(options, _COUNTS)
    runs.verify_mixture(options)
    for name in ("steps_per_epoch", "test_sentences"):
        if getattr(options, name) is not None:
            checks.verify_positive_int(getattr(options, name), name)
    if not math.isfinite(options.length_penalty):
        raise ValueError(
            "`length_penalty` must be a finite number. Received: length_penalty="
            f"{options.length_penalty}. Pass for example 0.6."
        )


def _build(options, vocabulary, middle, steps):
    keras.utils.set_random_seed(options.seed)
    return build_model(options, vocabulary, middle, steps)


def _train(model, options, corpus, batches, folder):
    folder.mkdir(exist_ok=True)
    train, steps = batches["train"]

    def fit(announce, callbacks, initial_epoch, **arguments):
        announce(steps)
        samples = SampleTranslations(corpus, print if options.verbose else None)
        model.fit(
            # A run that goes on, goes on with the pairs that come next.
            train.repeat().skip(steps * initial_epoch),
            steps_per_epoch=steps,
            validation_data=pairs.of_known_length(*batches["valid"]),
            callbacks=[*callbacks, samples],
            initial_epoch=initial_epoch,
            **arguments,
        )

    return runs.train(model, folder, options, fit)


class SampleTranslations(keras.callbacks.Callback):
    """Shows after every epoch how the model translates a few sentences."""

    def __init__(self, corpus, show, sentences=2):
        super().__init__()
        self.show = show
        self.samples = [
            (direction, source, target)
            for direction, pairs in corpus.pairs["valid"].items()
            for source, target in list(zip(*pairs, strict=True))[:sentences]
        ]

    def on_epoch_end(self, epoch, logs=None):
        if self.show is None:
            return
        sources = [source for _, source, _ in self.samples]
        languages = [_target(direction) for direction, *_ in self.samples]
        found = self.model.translate(sources, languages, num_beams=1, max_length=60)
        self.show("")
        for (direction, source, target), text in zip(self.samples, found, strict=True):
            self.show(
                f"  {direction}  {source}\n      model: {text}\n      human: {target}"
            )


def _target(direction):
    return split_direction(direction)[1]


def _evaluate(model, corpus, batches, options, folder):
    """Perplexity, and BLEU and chrF of each direction of the test set."""
    report: dict = {"parameters": model.count_params(), "directions": {}}
    print("Evaluating ...", flush=True)
    for split in ("valid", "test"):
        logs = model.evaluate(
            pairs.of_known_length(*batches[split]), verbose=0, return_dict=True
        )
        report[f"{split}_perplexity"] = logs["perplexity"]
    for layer in model.moe_layers:
        if layer.num_experts > 1:
            for name in ("max_over_mean_load", "load_cv"):
                key = f"{layer.name}_{name}"
                report[key] = logs[key]
    for direction, (sources, targets) in corpus.pairs["test"].items():
        sources = sources[: options.test_sentences]
        targets = targets[: options.test_sentences]
        language = _target(direction)
        print(
            f"Translating {len(sources):,} test sentences, {direction} ...", flush=True
        )
        start = time.perf_counter()
        found = _translate(model, sources, language, options)
        seconds = time.perf_counter() - start
        lines = [" ".join(text.split()) + "\n" for text in found]
        writing.write_text(folder / f"test.{direction}.txt", "".join(lines))
        report["directions"][direction] = {
            **telemetry.translation_scores(found, targets, language),
            "sentences": len(sources),
            "seconds": round(seconds, 1),
            "examples": [
                list(row) for row in zip(sources, found, targets, strict=True)
            ][:3],
        }
    return report


def _translate(model, texts, language, options):
    """By the search of the options, which is traced once."""
    return model.translate(
        texts,
        language,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
    )


def _draw(model, corpus, options, report, folder: Path):
    """Pictures of the history, of attention, and of the experts."""
    written = pictures.draw_history(
        folders.read_history(folder), folder / "loss.png", "translation model"
    )
    direction, (sources, _) = next(iter(corpus.pairs["test"].items()))
    # The first sentence of middling length, so that there is something to see.
    source = next((s for s in sources if 30 <= len(s) <= 60), sources[0])
    written += _draw_attention(model, source, _target(direction), options, folder)
    languages = corpus.target_languages
    tables = experts_by_language(model, corpus, options)
    for name, table in tables.items():
        report[f"{name}_experts_and_languages"] = information_report(table)
        written += pictures.draw_experts_by_language(
            table.counts, languages, name, folder / f"{name}_by_language.png"
        )
    return written


def _draw_attention(model, source, language, options, folder):
    vocabulary = model.vocabulary
    text = _translate(model, source, language, options)
    ids = vocabulary.encode_source([source], [language]).to_tensor()
    targets = vocabulary.encode_target([text]).to_tensor()
    weights = model.attention(ids, target_inputs(targets))[0]
    source_pieces, target_pieces = (
        vocabulary.pieces(row) for row in (ids[0], targets[0])
    )
    return pictures.draw_attention(
        weights, source_pieces, target_pieces, folder / "attention.png"
    )


def _print_report(report):
    print("\nPerplexity of subwords, end of sentence included:")
    columns = [("model", report)]
    if "baseline" in report:
        columns.append(("dense of equal operations", report["baseline"]))
    for title, figures in columns:
        print(
            f"  {title:<27} validation {figures['valid_perplexity']:7.2f}   "
            f"test {figures['test_perplexity']:7.2f}   "
            f"{figures['parameters']:,} parameters, "
            f"trained in {figures['training_seconds']:.0f} s"
        )
    print("\nTest sentences by beam search:")
    for title, figures in columns:
        for direction, row in figures["directions"].items():
            print(
                f"  {title:<27} {direction:<9} BLEU {row['bleu']:5.1f}   "
                f"chrF {row['chrf']:5.1f}   {row['sentences']:,} sentences in "
                f"{row['seconds']:.0f} s"
            )
    rows = report["directions"].values()
    for signature in sorted({r["bleu_signature"] for r in rows}):
        print(f"  BLEU|{signature}")
    for signature in sorted({r["chrf_signature"] for r in rows}):
        print(f"  chrF|{signature}")
    for direction, row in report["directions"].items():
        source, found, target = row["examples"][0]
        print(f"  {direction}  {source}\n      model: {found}\n      human: {target}")
    for key, value in report.items():
        if key.endswith("_max_over_mean_load"):
            print(f"Load of {key[:-19]} on the test set: max/mean {value:.2f}.")
        if key.endswith("_experts_and_languages"):
            print(
                f"{key[:-22]}: mutual information of expert and target language "
                f"{value['mutual_information']:.4f} nats; with shuffled labels "
                f"{value['shuffled_mean']:.4f} on average, {value['shuffled_max']:.4f} "
                "at most."
            )
