"""Pictures of a run. Without matplotlib none are drawn, and that is said."""

import warnings
from pathlib import Path

import numpy as np

from keras_moe import writing

_DRAWN = "#2a6f97"
_SECOND = "#c8553d"


def _figure(**options):
    """A figure without a window, or None if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(
            "No pictures: matplotlib is not installed. "
            "Install keras-moe[examples] to have them."
        )
        return None
    return Figure(layout="constrained", dpi=120, **options)


def _save(figure, path):
    with writing.written_beside(path) as partial:
        figure.savefig(partial)


def draw_history(
    history: list[dict], path: Path, of: str = "language model"
) -> list[tuple[Path, str]]:
    """Perplexity and balance over the epochs.

    Args:
        history: One dict of logs for each epoch.
        path: The PNG to write.
        of: Str. What kind of model. Defaults to `"language model"`.

    Returns:
        `[(path, description)]`, or `[]` if nothing was drawn.
    """
    figure = _figure(figsize=(6.4, 3.8)) if history else None
    if figure is None:
        return []
    axes = figure.subplots()
    epochs = [row["epoch"] + 1 for row in history]
    for key, label, color in (
        ("perplexity", "training", _DRAWN),
        ("val_perplexity", "validation", _SECOND),
    ):
        if key not in history[0]:  # a sampled softmax has none in training
            continue
        axes.plot(epochs, [row[key] for row in history], "o-", label=label, color=color)
    axes.set(xlabel="epoch", ylabel="perplexity (log scale)", yscale="log")
    axes.set_title(f"Perplexity of the {of}")
    axes.set_xticks(epochs)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    _save(figure, path)
    return [(path, "picture of the perplexity")]


def draw_load(counts: np.ndarray, path: Path) -> list[tuple[Path, str]]:
    """Share of the tokens of each expert, the busiest first.

    Args:
        counts: `(E,)` true counts.
        path: The PNG to write.

    Returns:
        `[(path, description)]`, or `[]` if nothing was drawn.
    """
    figure = _figure(figsize=(6.4, 3.4))
    if figure is None:
        return []
    axes = figure.subplots()
    relative = np.sort(counts)[::-1] / counts.mean()
    axes.bar(np.arange(relative.size), relative, width=0.85, color=_DRAWN)
    axes.axhline(1.0, color=_SECOND, linestyle="--", label="perfect balance")
    axes.set(
        xlabel="expert, the busiest first",
        ylabel="load / mean load",
        title=f"Load of {relative.size} experts on the test text: "
        f"max/mean {relative[0]:.2f}",
    )
    axes.legend()
    _save(figure, path)
    return [(path, "picture of the experts' load")]


def draw_attention(
    weights: np.ndarray, source: list[str], target: list[str], path: Path
) -> list[tuple[Path, str]]:
    """How much of each source piece every target piece took.

    Args:
        weights: `(target, source)`, rows sum to 1.
        source: Pieces of the source.
        target: Pieces of the translation.
        path: The PNG to write.

    Returns:
        `[(path, description)]`, or `[]` if nothing was drawn.
    """
    size = (1.6 + 0.34 * len(source), 1.6 + 0.3 * len(target))
    figure = _figure(figsize=size)
    if figure is None:
        return []
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(source)), source, rotation=60, ha="right")
    axes.set_yticks(range(len(target)), target)
    axes.set(xlabel="source", ylabel="translation", title="Attention")
    figure.colorbar(image, ax=axes, label="weight")
    with warnings.catch_warnings():
        # The font may lack letters of a language; boxes stand in for them.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        _save(figure, path)
    return [(path, "picture of the attention")]


def draw_experts_by_language(
    counts: np.ndarray, languages: tuple[str, ...], name: str, path: Path
) -> list[tuple[Path, str]]:
    """Whose tokens each expert takes, experts sorted by the language they serve.

    Args:
        counts: `(E, languages)`, each language with the same sum.
        languages: Names of the languages.
        name: Name of the mixture.
        path: The PNG to write.

    Returns:
        `[(path, description)]`, or `[]` if nothing was drawn.
    """
    figure = _figure(figsize=(1.6 + 0.16 * max(24, len(counts)), 3.4))
    if figure is None:
        return []
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    image = axes.imshow(shares[order].T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(languages)), languages)
    axes.set_xticks(range(len(order)), order, rotation=90, fontsize=6)
    axes.set(
        xlabel="expert", ylabel="target language", title=f"Whose tokens {name} takes"
    )
    figure.colorbar(image, ax=axes, label="share of the expert's tokens")
    _save(figure, path)
    return [(path, f"picture of the experts of {name} by language")]


def draw_plans(plans: list, path: Path) -> list[tuple[Path, str]]:
    """Memory of the busiest device and time of a step, of one plan or many.

    Args:
        plans: List of `keras_moe.planning.Plan`, or one `ModelPlan`.
        path: The PNG to write.

    Returns:
        `[(path, description)]`, or `[]` if nothing was drawn.
    """
    height = 1.9 + 0.32 * len(plans)
    figure = _figure(figsize=(11, height))
    if figure is None:
        return []
    memory_axes, time_axes = figure.subplots(1, 2, sharey=True)
    names = [plan.name for plan in plans]
    kinds: tuple[str, ...] = ("weights", "slots", "gradients", "activations")
    if not isinstance(
        plans[0].memory.weights, dict
    ):  # of a model: what is there at once
        kinds = ("weights", "slots", "inputs", "step", "routing")
    sizes = {kind: [_total(p.memory, kind) / 1e9 for p in plans] for kind in kinds}
    _stack(memory_axes, names, sizes)
    limit = plans[0].cluster.memory_gb
    most = max(sum(column) for column in zip(*sizes.values(), strict=True))
    if limit < 4 * most:  # else it would leave no room for the bars
        memory_axes.axvline(limit, color=_SECOND, linestyle="--", label="memory")
    memory_axes.set(xlabel="GB on the busiest device", title=f"Memory, of {limit:g} GB")
    _stack(
        time_axes,
        names,
        {part: [p.seconds[part] for p in plans] for part in plans[0].seconds},
    )
    time_axes.set(xlabel="seconds, one part after the other", title="A training step")
    memory_axes.invert_yaxis()
    for axes in (memory_axes, time_axes):
        if len(plans) > 1:
            axes.legend(fontsize=7, loc="lower right")
        else:  # beside its one bar
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
            axes.locator_params(axis="x", nbins=6)
        axes.grid(True, axis="x", alpha=0.25)
    counts = sorted({plan.num_devices for plan in plans})
    devices = " or ".join(f"{n:,}" for n in counts) if len(counts) < 5 else "several"
    figure.suptitle(f"{devices} x {plans[0].cluster.device}")
    _save(figure, path)
    return [(path, "picture of memory and step time")]


def _total(memory, kind):
    size = getattr(memory, kind)
    return sum(size.values()) if isinstance(size, dict) else size


def draw_scaling(scaled: list, path: Path) -> list[tuple[Path, str]]:
    """Efficiency and time of a step on more and more devices.

    Args:
        scaled: List of `keras_moe.planning.Scaling`.
        path: The PNG to write.

    Returns:
        `[(path, description)]`, or `[]` if nothing was drawn.
    """
    figure = _figure(figsize=(11, 4.2))
    if figure is None:
        return []
    left, right = figure.subplots(1, 2)
    colors = _colors(len(scaled))
    for each, color in zip(scaled, colors, strict=True):
        devices = [point.num_devices for point in each.points]
        for name, style, how in (("", "o-", "after"), ("overlapped_", "s--", "hidden")):
            label = f"{each.name}, communication {how}"
            shares = [100 * getattr(p, f"{name}efficiency") for p in each.points]
            seconds = [getattr(p, f"{name}seconds") for p in each.points]
            left.plot(devices, shares, style, color=color, label=label, markersize=4)
            right.plot(devices, seconds, style, color=color, markersize=4)
    left.set(
        ylabel="efficiency (%)", ylim=(0, None), title="Throughput over one device's"
    )
    right.set(ylabel="seconds", ylim=(0, None), title="A training step")
    for axes in (left, right):
        axes.set(xlabel="devices", xscale="log")
        axes.set_xticks(devices, [f"{n:,}" for n in devices], rotation=45, fontsize=8)
        axes.minorticks_off()
        axes.grid(True, alpha=0.25)
    left.legend(fontsize=7, loc="lower left")
    figure.suptitle(f"The same batch on each of more {scaled[0].cluster.device}")
    _save(figure, path)
    return [(path, "picture of more and more devices")]


def _colors(number: int) -> list[str]:
    named = [_DRAWN, _SECOND, *(f"C{i}" for i in range(1, 10))]
    return [named[i % len(named)] for i in range(number)]


def _stack(axes, names, parts):
    left: np.ndarray = np.zeros(len(names))
    for label, values in parts.items():
        if any(values):
            axes.barh(names, values, left=left, label=label)
            left += values
