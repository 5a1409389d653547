"""Which experts serve which target language."""

from dataclasses import dataclass

import numpy as np

from keras_moe import telemetry
from keras_moe.data.translation import split_direction, target_inputs

_SHUFFLES = 20


@dataclass(frozen=True, eq=False)
class ExpertsByLanguage:
    """Experts and target languages of one mixture, counted over test sentences.

    Attributes:
        counts: `(experts, languages)` float64: tokens of each language that each
            expert took, the languages made equally large.
        information: Float. Mutual information of expert and language, in nats.
        shuffled: The same with the languages shuffled among the sentences.
    """

    counts: np.ndarray
    information: float
    shuffled: tuple[float, ...]

    def report(self) -> dict:
        """Figures for the report."""
        return {
            "mutual_information": self.information,
            "shuffled_mean": float(np.mean(self.shuffled)),
            "shuffled_max": max(self.shuffled),
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
        Dict of mixture name to `ExpertsByLanguage`.
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
    generator = np.random.default_rng(options.seed)
    found = {}
    for name, counted in rows.items():
        table, label = np.stack(counted), np.array(labels)
        counts = _by_label(table, label, len(languages))
        shuffled = [
            _by_label(table, generator.permutation(label), len(languages))
            for _ in range(_SHUFFLES)
        ]
        found[name] = ExpertsByLanguage(
            counts,
            telemetry.mutual_information(counts),
            tuple(map(telemetry.mutual_information, shuffled)),
        )
    return found


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
            real = (ids.numpy() != 0)[..., np.newaxis] & (experts >= 0) & (gates > 0)
            for sentence, chosen in zip(experts, real, strict=True):
                rows[layer.name].append(
                    np.bincount(sentence[chosen], minlength=layer.num_experts)
                )


def _by_label(table, label, num_labels):
    """`(sentences, E)` -> `(E, languages)`, each language with the same sum."""
    counts = np.stack([table[label == i].sum(0) for i in range(num_labels)], axis=1)
    return counts / np.maximum(counts.sum(0, keepdims=True), 1)
