"""Exports what a training run has saved, for TensorFlow Serving."""

import importlib.util
import json
from pathlib import Path

import keras

from keras_moe import data, models, serving
from keras_moe.commands import runs
from keras_moe.commands.options import ExportOptions

VOCABULARY = "vocabulary.tsv"


def run(options: ExportOptions) -> Path:
    """Exports the model of a run and says how to serve it.

    Args:
        options: See `ExportOptions`.

    Returns:
        Path of the SavedModel.

    Raises:
        ValueError: `run_dir` holds no finished run, or an option does not fit
            its model.
        ImportError: A library that an option needs is not installed.
    """
    folder = Path(options.run_dir)
    if not (folder / runs.MODEL).is_file():
        raise ValueError(
            "`run_dir` must be the folder of a finished train-lm or train-mt. "
            f"Received: {options.run_dir!r}, without {runs.MODEL}. Train first."
        )
    print(f"Exporting {folder / runs.MODEL} ...", flush=True)
    model = keras.saving.load_model(folder / runs.MODEL)
    text = None
    if (folder / VOCABULARY).is_file() and not options.ids:
        settings = json.loads((folder / runs.SETTINGS).read_text())
        text = text_codec(
            data.Vocabulary.load(folder / VOCABULARY),
            "whitespace"
            if settings.get("tfds")
            else settings["tokenizer"] or data.default_tokenizer(settings["data_dir"]),
        )
    path = serving.export(
        model,
        options.output_dir or folder / "saved_model",
        version=options.version,
        signatures=options.signatures.split(",") if options.signatures else None,
        text=text,
        warmup=_warmup(model, text) if options.warmup else (),
    )
    print(f"Wrote {path}. Serve it, and ask it, as docs/guides/serving.md shows.")
    return path


def text_codec(vocabulary: data.Vocabulary, tokenizer: str) -> serving.TextCodec | None:
    """Strings for the model of a run, or None where tensorflow-text is missing."""
    if importlib.util.find_spec("tensorflow_text") is None:
        print("Token ids only: for strings, `pip install keras-moe[text]`.")
        return None
    return serving.TextCodec(vocabulary, tokenizer)


def _warmup(model, text):
    """A request or two for every signature that the model has."""
    if isinstance(model, models.MoETranslator):
        languages = list(model.vocabulary.languages[:1]) if model.vocabulary else []
        return [
            ("translate", {"texts": ["a"] * rows, "target_languages": languages})
            for rows in (1, 8)
            if languages
        ]
    if not isinstance(model, models.MoELanguageModel):
        return []
    requests = []
    for rows in (1, 8):
        given = [[2]] * rows if text is None else ["a"] * rows
        name, prompt = ("inputs",) * 2 if text is None else ("text", "prompt")
        settings = {
            "temperature": [1.0] * rows,
            "top_k": [0] * rows,
            "max_new_tokens": [2] * rows,
            "seed": [0] * rows,
        }
        requests += [
            ("score", {name: given}),
            ("generate", {prompt: given, **settings}),
        ]
    return requests
