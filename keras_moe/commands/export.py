"""Exports what a training run has saved, for TensorFlow Serving."""

import importlib.util
import os
from pathlib import Path

from keras_moe import data, models, serving
from keras_moe.commands import folders
from keras_moe.commands.options import ExportOptions

VOCABULARY = "vocabulary.tsv"
_IDS = (
    "Bring it back from a copy, or export with --ids, for token ids instead of strings."
)


def run(options: ExportOptions) -> Path:
    """Exports the model of a run and says how to serve it.

    Args:
        options: See `ExportOptions`.

    Returns:
        Path of the SavedModel.

    Raises:
        ValueError: `run_dir` holds no finished run or a damaged one, `output_dir`
            cannot be written, or an option does not fit the model.
        ImportError: A library that an option needs is not installed.
    """
    folder = Path(options.run_dir)
    if not os.path.lexists(folder / folders.MODEL):
        raise ValueError(
            "`run_dir` must be the folder of a finished train-lm or train-mt. "
            f"Received: {options.run_dir!r}, without {folders.MODEL}. Train first."
        )
    target = Path(options.output_dir or folder / "saved_model")
    folders.verify_writable(target, "output_dir")
    print(f"Exporting {folder / folders.MODEL} ...", flush=True)
    model = folders.load_model(folder / folders.MODEL)
    text = None
    if (folder / VOCABULARY).exists() and not options.ids:
        text = text_codec(_vocabulary(model, folder), _tokenizer(folder))
    path = serving.export(
        model,
        target,
        version=options.version,
        signatures=options.signatures.split(",") if options.signatures else None,
        text=text,
        warmup=_warmup(model, text) if options.warmup else (),
    )
    print(f"Wrote {path}. Serve it, and ask it, as docs/guides/serving.md shows.")
    return path


def _vocabulary(model, folder):
    path = folder / VOCABULARY
    vocabulary = folders.read_whole(path, lambda: data.Vocabulary.load(path), _IDS)
    size = getattr(model, "vocabulary_size", len(vocabulary))
    if len(vocabulary) != size:
        reason = f"it has {len(vocabulary)} tokens, the model {size}"
        raise folders.damaged(path, reason, _IDS)
    return vocabulary


def _tokenizer(folder):
    """The tokenizer that a run of `train-lm` was given."""
    path = folder / folders.SETTINGS
    settings = folders.read_json(path, _IDS)
    if settings.get("tfds"):
        return "whitespace"
    try:
        named = settings["tokenizer"] or data.default_tokenizer(settings["data_dir"])
        data.tokenize("", named)  # raises if unknown
    except (KeyError, TypeError, ValueError) as error:
        raise folders.damaged(path, "it names no tokenizer", _IDS) from error
    return named


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
