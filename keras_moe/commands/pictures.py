"""Pictures of a run. Without matplotlib none are drawn, and that is said."""

from pathlib import Path

import numpy as np

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


def draw_history(history: list[dict], path: Path) -> list[tuple[Path, str]]:
    """Perplexity and balance over the epochs.

    Args:
        history: One dict of logs for each epoch.
        path: The PNG to write.

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
    axes.set_title("Perplexity of the language model")
    axes.set_xticks(epochs)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.savefig(path)
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
    figure.savefig(path)
    return [(path, "picture of the experts' load")]
