"""Which experts serve which target language."""

import numpy as np

from keras_moe import telemetry
from keras_moe.data.translation import split_direction, target_inputs
from keras_moe.data.vocabulary import PAD_ID


def information_report(found: telemetry.LabelInformation) -> dict:
    """Figures of one mixture for the report."""
    return {
        "mutual_information": found.information,
        "shuffled_mean": float(np.mean(found.shuffled)),
        "shuffled_max": max(found.shuffled),
    }


def experts_by_language(model, corpus, options, sentences: int = 200) -> dict:
    """Counts for each mixture which experts took the tokens of each language.

    Only where there are several target languages. Every sentence is one unit for
    the shuffling, since the tokens of a sentence go together.

    Args:
        model: `MoETranslator` with a vocabulary.
        corpus: `TranslationCorpus`.
        options: `TrainMTOptions`.
        sentences: Int. Test pairs of each direction, at most. Defaults to `200`.

    Returns:
        Dict of mixture name to `telemetry.LabelInformation`; its counts are
        `(experts, languages)`.
    """
    languages = corpus.target_languages
    mixtures = [layer for layer in model.moe_layers if layer.num_experts > 1]
    if len(languages) < 2 or not mixtures:
        return {}
    rows: dict[str, list[np.ndarray]] = {layer.name: [] for layer in mixtures}
    labels: list[int] = []
    for direction, pairs in corpus.pairs["test"].items():
        language = split_direction(direction)[1]
        sources, targets = (side[:sentences] for side in pairs)
        _count(model, mixtures, sources, targets, language, rows)
        labels += [languages.index(language)] * len(sources)
    return {
        name: telemetry.label_information(
            np.stack(counted), np.array(labels), len(languages), seed=options.seed
        )
        for name, counted in rows.items()
    }


def _count(model, mixtures, sources, targets, language, rows):
    """Adds to `rows` the experts' counts of each sentence, `(E,)`."""
    vocabulary = model.vocabulary
    for start in range(0, len(sources), 64):
        texts = sources[start : start + 64]
        source = vocabulary.encode_source(texts, [language] * len(texts)).to_tensor()
        target = vocabulary.encode_target(targets[start : start + 64]).to_tensor()
        before = target_inputs(target)
        routing = model.routing(source, before)
        for layer in mixtures:
            experts, gates = routing[layer.name]
            ids = source if layer in model.encoder_middle else before
            real = (
                (ids.numpy() != PAD_ID)[..., np.newaxis] & (experts >= 0) & (gates > 0)
            )
            for sentence, chosen in zip(experts, real, strict=True):
                rows[layer.name].append(
                    np.bincount(sentence[chosen], minlength=layer.num_experts)
                )
