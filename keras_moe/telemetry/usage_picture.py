"""The picture of `ExpertUsage`: every expert's load over time."""

import os
from typing import Any

import numpy as np

from keras_moe import writing

_DRAWN = "#2a6f97"
_SECOND = "#c8553d"
_THIRD = "#588157"


def draw(records: dict[str, dict[str, list[Any]]], path: str | os.PathLike) -> None:
    """Draws a row for each mixture: a heat map of its load, and the balance.

    Args:
        records: Those of `ExpertUsage`.
        path: The PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are no records of training, or `path` can't be written.
    """
    writing.verify_picture(path, "path")
    from matplotlib.figure import Figure

    rows = {name: splits for name, splits in records.items() if splits["train"]}
    if not rows:
        raise ValueError(
            "There must be records of training to draw. Received: 0 records. Call "
            "`draw` after `fit`."
        )
    figure = Figure(figsize=(11, 3.6 * len(rows)), dpi=120, layout="constrained")
    panels = figure.subplots(
        len(rows), 2, squeeze=False, gridspec_kw={"width_ratios": (3, 2)}
    )
    for (left, right), (name, splits) in zip(panels, rows.items(), strict=True):
        image = _draw_loads(left, name, splits["train"])
        figure.colorbar(image, ax=left, label="load / mean load")
        _draw_balance(right, splits)
    with writing.written_beside(path) as partial:
        figure.savefig(partial)


def _draw_loads(axes, name, records):
    """A column for each record, as wide as its steps."""
    counts = np.stack([record.totals.counts for record in records], axis=1)
    relative = counts / np.maximum(counts.mean(axis=0), 1e-30)
    ends = np.array([record.step for record in records], np.float64)
    begin = ends[0] - (ends[1] - ends[0] if len(ends) > 1 else ends[0])
    edges = np.concatenate([[max(begin, 0.0)], ends])
    # Where all is well the colors are still told apart, and one expert that takes
    # nearly everything does not hide the others.
    top = max(2.0, float(np.percentile(relative, 99)))
    image = axes.pcolormesh(
        edges, np.arange(len(counts) + 1), relative, cmap="viridis", vmin=0, vmax=top
    )
    axes.set(
        xlabel="training step", ylabel="expert", title=f"Load of the experts of {name}"
    )
    return image


def _draw_balance(axes, splits):
    for key, label, color in (
        ("max_over_mean_load", "max/mean load", _DRAWN),
        ("load_cv", "CV of the load", _SECOND),
        ("choices_kept", "choices that noise leaves", _THIRD),
    ):
        for split, style in (("train", "-"), ("validation", "o")):
            points = [
                (r.step, r.figures[key]) for r in splits[split] if key in r.figures
            ]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, style, color=color, label=f"{label}, {split}", ms=4)
    axes.set(xlabel="training step", title="Balance (max/mean is 1 at best, CV 0)")
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8)
