"""Trains a language model, measures it, saves it, and shows what it does."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_moe import data, distribution, models, serving, telemetry
from keras_moe.commands import compiling, devices, folders, pictures, runs
from keras_moe.commands.export import VOCABULARY, text_codec
from keras_moe.commands.options import TrainLMOptions
from keras_moe.data.vocabulary import PAD_ID, UNK_ID
from keras_moe.models.middle import gate_units, names_of

_COUNTS = ("epochs", "patience", "batch_size", "sequence_length", "warmup_steps")
REPORT = "report.json"
# Evaluation streams: few rows, so that little text begins from zero state.
_EVALUATION_BATCH_SIZE = 8
# Of the text in which the experts' contexts are looked up.
_CONTEXT_LENGTH = 128
_CONTEXT_TOKENS = 50_000
_FREQUENT_WORDS = 100


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
    runs.verify_numbers(options, (*_COUNTS, "num_mixtures"))
    runs.verify_mixture(options)
    _verify_tokens(options)
    _verify_baseline(options)
    if devices.launch_workers(options):
        return folders.read_json(Path(options.output_dir) / REPORT, folders.ANEW)
    with runs.numbers_of(options.dtype):
        strategy = devices.make_strategy(options)
        with devices.lost_workers_named(strategy):
            return _run(options, strategy)


def _run(options, strategy):
    folder = devices.own_folder(Path(options.output_dir), strategy)
    folders.check_folder(options, folder)
    print("Reading the text ...", flush=True)
    corpus = _corpus(options)
    print(
        f"{corpus.name}: {corpus.num_tokens('train'):,} training, "
        f"{corpus.valid.size:,} validation and {corpus.test.size:,} test tokens, vocabulary of "
        f"{len(corpus.vocabulary):,}."
    )
    _verify_lengths(corpus, options)
    model = _build(options, corpus, options.middle, strategy)
    folders.prepare_folder(options, folder)
    _keep_vocabulary(corpus.vocabulary, folder)
    seconds = _train(model, options, corpus, folder, strategy)
    report = _evaluate(model, corpus, options)
    report["training_seconds"] = round(seconds, 1)
    if _has_baseline(options):
        print("\nThe dense baseline of equal operations (one wide expert):")
        dense = _build(options, corpus, "moe_1_wide", strategy)
        seconds = _train(dense, options, corpus, folder / "baseline", strategy)
        figures = _evaluate(dense, corpus, options)
        for name in ("test_perplexity", "valid_perplexity"):
            report[f"baseline_{name}"] = figures[name]
        report["baseline_training_seconds"] = round(seconds, 1)
    print("Saving and exporting ...", flush=True)
    folders.save_model(model, folder)
    saved_model = serving.export(
        model,
        folder / "saved_model",
        text=text_codec(corpus.vocabulary, corpus.tokenizer),
    )
    written = pictures.draw_history(folders.read_history(folder), folder / "loss.png")
    if "expert_counts" in report:
        counts = np.array(report["expert_counts"])
        written += pictures.draw_load(counts, folder / "expert_load.png")
    # On one device from here on, whatever it was trained on.
    reloaded = keras.saving.load_model(folder / folders.MODEL)
    written += _write_contexts(reloaded, corpus, folder)
    folders.write_json(folder / REPORT, report)
    _print_report(report)
    runs.print_files(
        [
            (folder / folders.MODEL, "the model, for keras.saving.load_model"),
            (saved_model, "SavedModel, for TF Serving: score, generate, routing"),
            (folder / VOCABULARY, "tokens in the order of their ids, with counts"),
            (folder / folders.HISTORY, "the logs of every epoch"),
            (folder / REPORT, "the figures above"),
            *written,
            *runs.usage_files(folder),
        ]
    )
    _show_reloaded(reloaded, corpus, options)
    if "baseline_test_perplexity" in report:
        print(
            f"\nTest perplexity {report['test_perplexity']:.1f} with "
            f"{model.moe_layers[0].num_experts} experts, "
            f"{report['baseline_test_perplexity']:.1f} dense (equal operations)."
        )
    return report


def _corpus(options):
    if options.tfds is None:
        corpus = data.load_text_corpus(
            options.data_dir,
            tokenizer=options.tokenizer,
            vocabulary_size=options.vocabulary_size,
            min_count=options.min_count,
        )
        train = corpus.train[: options.tokens]
        return dataclasses.replace(corpus, train=train)
    return data.load_tfds_text(
        options.tfds,
        data_dir=options.data_dir,
        vocabulary_size=options.vocabulary_size,
        min_count=options.min_count,
    )


def _verify_lengths(corpus, options):
    """Every row of a batch needs a token."""
    for split, rows, otherwise in (
        ("train", options.batch_size, ", or lower `batch_size`"),
        ("valid", _EVALUATION_BATCH_SIZE, ""),
        ("test", _EVALUATION_BATCH_SIZE, ""),
    ):
        tokens = corpus.num_tokens(split)
        if tokens < rows:
            raise ValueError(
                f"The {split!r} text must have at least {rows} tokens, one for each "
                f"row that it is cut into. Received: {tokens} tokens in "
                f"{corpus.name!r}. Give a longer text{otherwise}."
            )


def _verify_tokens(options):
    if options.tokens is not None and (options.tokens < 1 or options.tfds):
        raise ValueError(
            "`tokens` must be at least 1, and is for text that is read whole. Received: "
            f"tokens={options.tokens}, tfds={options.tfds!r}. Leave it out for all."
        )


def _has_baseline(options):
    return options.baseline and options.middle == "moe"


def _verify_baseline(options):
    if options.preset is None or not _has_baseline(options):
        return
    if models.preset(options.preset).middle != "moe":
        raise ValueError(
            "`baseline` compares with a mixture of experts. Received: preset="
            f"{options.preset!r}, which has none. Leave `baseline` out."
        )


def _keep_vocabulary(vocabulary, folder):
    """Writes the vocabulary, or sees that a run goes on with its own."""
    path = folder / VOCABULARY
    if path.exists() and (folder / folders.HISTORY).exists():
        remedy = (
            "Bring back the text that the run began with, or start again in another "
            "`output_dir` or with --overwrite."
        )
        known = folders.read_whole(path, lambda: data.Vocabulary.load(path), remedy)
        if known != vocabulary:
            raise folders.damaged(path, "the text has other words", remedy)
    vocabulary.save(path)


def build_model(
    options: TrainLMOptions, vocabulary_size: int, middle: str, steps: int
) -> models.MoELanguageModel:
    """The compiled language model that the options describe.

    Args:
        options: Those of the command.
        vocabulary_size: Of the text.
        middle: That of the options, or `"moe_1_wide"` for the dense model of equal
            operations.
        steps: Of the whole training.
    """
    common: dict[str, Any] = {"stateful": True, "num_sampled": options.num_sampled}
    is_factored = False
    if options.preset is None:
        model = models.MoELanguageModel(
            vocabulary_size,
            options.units,
            middle=_middle(options, middle),
            lstm_units=options.lstm_units,
            dropout=options.dropout,
            **common,
        )
    else:
        preset = _scaled(options, vocabulary_size)
        if middle != options.middle:  # the baseline of equal operations
            k = (preset.experts_per_token,)
            preset = dataclasses.replace(preset, middle=middle, k=k, num_groups=None)
        elif preset.expert_optimizer == "factored_adam":
            is_factored = True
        model = models.build_language_model(preset, **common)
    model.build((options.batch_size, options.sequence_length))
    schedule = compiling.learning_rate(options, steps)
    own: dict[str, Any] = {"factored": None} if is_factored else {}
    if options.num_sampled is not None and options.untouched_rows != "decay":
        own["untouched_rows"] = options.untouched_rows
    optimizer = compiling.make_optimizer(
        options, model, schedule, global_clipnorm=1.0, **own
    )
    compiling.compile_model(model, optimizer)
    return model


def _middle(options, kind):
    same = ("hidden_units", "activation", "shared_units", "units", "expert_dropout")
    common = {name: getattr(options, name) for name in same}
    levels = (options.k,) if options.num_groups is None else (options.k, options.k)
    if kind != "moe":
        if kind != options.middle:  # the baseline: as many operations as with the gates
            common["shared_units"] += gate_units(
                options.num_experts,
                levels,
                options.num_groups,
                options.gating,
                options.noise_stddev,
            )
        return models.middle_layers(
            kind, k=math.prod(levels), num_mixtures=options.num_mixtures, **common
        )
    return [
        models.make_mixture(
            num_experts=options.num_experts,
            k=levels,
            num_groups=options.num_groups,
            gating=options.gating,
            loss_weight=options.loss_weight,
            scaling_factor=options.scaling_factor,
            noise=options.noise_stddev,
            name=name,
            **common,
        )
        for name in names_of(kind, options.num_mixtures)
    ]


def _scaled(options, vocabulary_size):
    preset = models.preset(options.preset)
    if preset.kind != "language_model":
        raise ValueError(
            "`preset` of train-lm must be of a language model. Received: "
            f"preset={options.preset!r}. Leave out those that begin with mt_."
        )
    return models.scale_down(
        preset,
        factor=options.preset_factor,
        max_experts=options.num_experts,
        vocabulary_size=vocabulary_size,
    )


def _build(options, corpus, middle, strategy):
    keras.utils.set_random_seed(options.seed)
    with devices.scope_of(strategy):
        steps = options.epochs * _steps(corpus, options)
        model = build_model(options, len(corpus.vocabulary), middle, steps)
    if strategy is not None:
        tokens = options.batch_size * options.sequence_length
        print(distribution.describe(model, tokens))
    return model


def _train(model, options, corpus, folder, strategy):
    folder.mkdir(exist_ok=True)
    train = corpus.dataset("train", options.batch_size, options.sequence_length)

    def fit(announce, **arguments):
        steps = int(train.cardinality())
        announce(steps if steps > 0 else _steps(corpus, options))
        valid = _evaluation_stream(corpus, "valid", options)
        model.fit(train, validation_data=valid, **arguments)

    return runs.train(model, folder, options, fit, strategy)


def _steps(corpus, options):
    """About how many batches a stream has whose end is not known."""
    tokens = options.batch_size * options.sequence_length
    return -(-corpus.num_tokens("train") // tokens)


def _evaluation_stream(corpus, split, options):
    return corpus.dataset(split, _EVALUATION_BATCH_SIZE, options.sequence_length)


def _evaluate(model, corpus, options):
    """Perplexities, and the experts' load as true counts over the test text."""
    print("Evaluating ...", flush=True)
    report = {"unigram_test_perplexity": 0.0}
    for split in ("valid", "test"):
        logs = model.evaluate(
            _evaluation_stream(corpus, split, options), verbose=0, return_dict=True
        )
        report[f"{split}_perplexity"] = logs["perplexity"]
    report["unigram_test_perplexity"] = data.unigram_perplexity(
        corpus.vocabulary, corpus.test
    )
    report["unknown_in_test"] = float(np.mean(corpus.test == UNK_ID))
    for layer in model.moe_layers:
        if layer.num_experts > 1:
            report["max_over_mean_load"] = logs[f"{layer.name}_max_over_mean_load"]
            report["load_cv"] = logs[f"{layer.name}_load_cv"]
            report["expert_counts"] = layer.balance.counts().numpy().tolist()
    return report


def _write_contexts(model, corpus, folder):
    """What each expert takes of the test text (table 9): HTML, text and CSV."""
    vocabulary = corpus.vocabulary
    if not any(layer.num_experts > 1 for layer in model.moe_layers):
        return []
    rows, time = _EVALUATION_BATCH_SIZE, _CONTEXT_LENGTH
    stream = corpus.dataset("test", rows, time).take(_CONTEXT_TOKENS // (rows * time))
    names = np.array(["", *vocabulary.tokens[1:]], dtype=object)
    # The experts' choice is measured against the word itself, if it is frequent.
    frequent = np.minimum(np.arange(len(names)), _FREQUENT_WORDS)
    shown = telemetry.ExpertSpecialization(
        stream.map(lambda tokens, *_: tokens),
        words=lambda tokens: names[tokens.numpy()],
        labels=lambda tokens: frequent[tokens.numpy()],
        label_name="word (rare ones taken together)",
    )
    model.reset_state()
    found = shown.analyze(model)
    model.reset_state()
    return [
        (path, "what each expert takes, by its largest gates")
        for path in shown.write(found, folder)
        if path.suffix == ".txt"
    ]


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


def _show_reloaded(model, corpus, options):
    """Samples from the model as it was saved, and shows its experts at work."""
    vocabulary = corpus.vocabulary
    prompt = vocabulary.encode(["<eos>"])[np.newaxis]
    print("\nSampled from the reloaded model:")
    for seed in range(3):
        sample = model.generate(
            prompt,
            40,
            temperature=0.8,
            seed=options.seed + seed,
            forbidden_tokens=(PAD_ID, UNK_ID),
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
