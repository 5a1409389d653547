"""The contexts of each expert's largest gates (table 9), and as text and CSV."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_moe.telemetry.information import LabelInformation, assignment_information


class Context(NamedTuple):
    """A token with the words around it.

    Attributes:
        gate: Float. Gate of the expert for the token.
        before: Str. Words before it.
        word: Str. The token.
        after: Str. Words after it.
    """

    gate: float
    before: str
    word: str
    after: str


class ExpertContexts(NamedTuple):
    """What the experts of one mixture take.

    Attributes:
        name: Str. Name of the layer.
        counts: `(E,)` int64, tokens of each expert.
        contexts: For each expert its `Context`s, the largest gate first.
        words: For each expert its most frequent words, with how often it took them.
        information: `LabelInformation` of experts and the given labels, or None.
        labels: Names of the labels, in the order of `information.counts`.
        label_name: What the labels are.
    """

    name: str
    counts: np.ndarray
    contexts: tuple[tuple[Context, ...], ...]
    words: tuple[tuple[tuple[str, int], ...], ...]
    information: LabelInformation | None = None
    labels: tuple[str, ...] = ()
    label_name: str = "label"


class Routed(NamedTuple):
    """Batches of words, and where a mixture sent them.

    Attributes:
        rows: Rows of words.
        row: `(N,)` int, the row of each token.
        column: `(N,)` int, its place there.
        experts: `(N, k)` int, `-1` where there is none.
        gates: `(N, k)` float.
    """

    rows: Sequence[Sequence[str]]
    row: np.ndarray
    column: np.ndarray
    experts: np.ndarray
    gates: np.ndarray


def expert_contexts(
    name: str,
    num_experts: int,
    routed: Routed,
    *,
    labels: np.ndarray | None = None,
    units: np.ndarray | None = None,
    label_name: str = "label",
    num_contexts: int = 10,
    window: int = 6,
) -> ExpertContexts:
    """Finds for every expert the contexts of its largest gates.

    A context that reads like one already found, to the last word of the window, is
    passed over. Equal gates stay in the order of the text.

    Args:
        name: Str. Name of the layer.
        num_experts: E.
        routed: `Routed`.
        labels: `(N,)` str or int, or None. A label of each token.
        units: `(N,)` int or None. The unit in which labels are shuffled for the
            null; None shuffles them among single tokens.
        label_name: Str. What the labels are. Defaults to `"label"`.
        num_contexts: Int. Contexts of an expert, at most. Defaults to `10`.
        window: Int. Words on either side. Defaults to `6`.

    Returns:
        An `ExpertContexts`.

    Reference:
        Shazeer et al. 2017, appendix E, table 9.
    """
    token, place = np.nonzero((routed.experts >= 0) & (routed.gates > 0))
    experts, gates = routed.experts[token, place], routed.gates[token, place]
    # By expert, then by falling gate, then in the order of the text.
    order = np.lexsort((token, -gates, experts))
    token, experts, gates = token[order], experts[order], gates[order]
    ends: Any = np.searchsorted(experts, np.arange(num_experts + 1))
    contexts, words = [], []
    for expert in range(num_experts):
        start, end = ends[expert], ends[expert + 1]
        contexts.append(
            _contexts(routed, token[start:end], gates[start:end], num_contexts, window)
        )
        taken = Counter(
            routed.rows[routed.row[n]][routed.column[n]] for n in token[start:end]
        )
        words.append(tuple(taken.most_common(num_contexts)))
    found = ExpertContexts(name, np.diff(ends), tuple(contexts), tuple(words))
    if labels is None:
        return found
    # Only labels of tokens that some expert took: padding has none.
    names, numbers = np.unique(labels[token], return_inverse=True)
    units = np.arange(len(labels)) if units is None else units
    information = assignment_information(
        experts, numbers, (num_experts, len(names)), units=units[token]
    )
    return found._replace(
        information=information, labels=tuple(map(str, names)), label_name=label_name
    )


def _contexts(routed, tokens, gates, number, window):
    found: dict[tuple[str, str, str], Context] = {}
    for n, gate in zip(tokens, gates, strict=True):
        row, column = routed.rows[routed.row[n]], routed.column[n]
        text = (
            " ".join(row[max(0, column - window) : column]).strip(),
            row[column],
            " ".join(row[column + 1 : column + 1 + window]).strip(),
        )
        found.setdefault(text, Context(float(gate), *text))
        if len(found) == number:
            break
    return tuple(found.values())


def information_text(found: ExpertContexts) -> str:
    """A sentence on experts and labels; "" without labels."""
    if found.information is None:
        return ""
    information, shuffled = found.information.information, found.information.shuffled
    largest = np.log(max(2, min(len(found.labels), len(found.counts))))
    return (
        f"Mutual information of expert and {found.label_name}, over {len(found.labels)} "
        f"labels of equal weight: {information:.3f} nats, at most {largest:.3f}. With "
        f"labels shuffled {len(shuffled)} times: mean {np.mean(shuffled):.3f}, largest "
        f"{max(shuffled):.3f}."
    )


def as_text(found: ExpertContexts) -> str:
    """The experts one after the other, the busiest first."""
    lines = [f"Experts of {found.name}, by the contexts of their largest gates", ""]
    if found.information is not None:
        lines += [information_text(found), ""]
    for expert in by_load(found):
        lines.append(f"Expert {expert}: {_load(found, expert)}")
        words = ", ".join(word for word, _ in found.words[expert])
        if words:
            lines.append(f"  most often: {words}")
        lines += [
            f"  {c.gate:.2f}  {c.before} [{c.word}] {c.after}"
            for c in found.contexts[expert]
        ]
        lines.append("")
    return "\n".join(lines)


def as_csv(found: ExpertContexts) -> str:
    """One row for each context."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(
        ("layer", "expert", "tokens", "rank", "gate", "before", "word", "after")
    )
    for expert, contexts in enumerate(found.contexts):
        for rank, c in enumerate(contexts, 1):
            writer.writerow(
                (
                    found.name,
                    expert,
                    found.counts[expert],
                    rank,
                    f"{c.gate:.6f}",
                    c.before,
                    c.word,
                    c.after,
                )
            )
    return file.getvalue()


def by_load(found: ExpertContexts) -> list[int]:
    """Experts, the busiest first."""
    return np.argsort(-found.counts, kind="stable").tolist()


def _load(found, expert):
    mean = max(found.counts.mean(), 1e-30)
    share = found.counts[expert] / max(found.counts.sum(), 1)
    return (
        f"{found.counts[expert]:,} tokens, {share:.1%} of the load, "
        f"{found.counts[expert] / mean:.2f} times the mean"
    )
