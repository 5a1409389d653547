"""Tables and pictures of what a sweep has recorded."""

import json

import numpy as np
from experiment import BEFORE

# What arms of one comparison share.
SHARED = ("kind", "corpus", "directions", "vocabulary_size", "tokens", "steps")
SHARED += ("points", "validation_tokens", "validation_pairs")


class Row:
    """An arm, over its seeds.

    Args:
        name: Str. Such as `moe_64`.
        settings: Dict of settings of the arm.
    """

    def __init__(self, name, settings):
        self.name, self.settings, self.title = name, settings, name
        self.found = []

    @property
    def is_mixture(self):
        return self.settings["middle"] == "moe"

    def mean(self, name):
        """Of a figure over the seeds; None if one lacks it."""
        values = [results.get(name) for results in self.found]
        return None if None in values else float(np.mean(values))

    def curve(self, name="perplexity"):
        """Tokens and a figure, each `(points,)`: the mean over the seeds."""
        tokens = np.array([p["tokens"] for p in self.found[0]["curve"]])
        values = [[p[name] for p in r["curve"]] for r in self.found]
        return tokens, np.mean(values, axis=0)


def comparisons(records):
    """Lists of `Row`, one for each comparison: what has seen the same, as often."""
    found = {}
    for record in records:
        settings = {**BEFORE.get(record["arm"]["kind"], {}), **record["arm"]}
        shared = json.dumps([settings.get(name) for name in SHARED])
        own = {k: v for k, v in settings.items() if k not in (*SHARED, "seed")}
        name = record.get("name") or name_of(settings)
        rows = found.setdefault(shared, {})
        key = json.dumps([name, own], sort_keys=True)
        rows.setdefault(key, Row(name, own)).found.append(record["results"])
    for rows in found.values():
        set_titles(list(rows.values()))
    return {key: list(rows.values()) for key, rows in found.items()}


def name_of(settings):
    """Of a record without a name."""
    kinds = {"moe_1_wide": "dense", "moe_1_deep": "deep"}
    if settings["middle"] != "moe":
        return kinds.get(settings["middle"], settings["middle"])
    kind = "hierarchical" if settings.get("num_groups") else "moe"
    side = {"encoder": "encoder_", "decoder": "decoder_"}.get(settings.get("mixtures"))
    return f"{side or ''}{kind}_{settings['num_experts']}"


def set_titles(rows):
    """Names with the settings in which rows of one name differ."""
    for row in rows:
        others = [r.settings for r in rows if r.name == row.name]
        differing = [
            f"{name}={value}"
            for name, value in row.settings.items()
            if any(other.get(name) != value for other in others)
        ]
        if differing:
            row.title = f"{row.name} [{', '.join(differing)}]"


def tables(records):
    """All tables, in Markdown."""
    parts = []
    for shared, rows in comparisons(records).items():
        shared = dict(zip(SHARED, json.loads(shared), strict=True))
        length = "tokens" if shared["tokens"] else "steps"
        where = shared["directions"]
        parts.append(
            f"{shared['corpus']}{f', {where}' if where else ''}, vocabulary of "
            f"{shared['vocabulary_size']:,}, {shared[length]:,} {length}:"
        )
        parts += [at_the_end(rows), by_points(rows), by_set(rows), of_experts(rows)]
    return "\n\n".join(filter(None, parts))


def table(columns, rows):
    """In Markdown, without the columns that are empty."""
    kept = [i for i in range(len(columns)) if any(row[i] != "" for row in rows)]
    lines = [[columns[i] for i in kept], ["---"] * len(kept)]
    lines += [[str(row[i]) for i in kept] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value, style=".2f"):
    return "" if value is None else format(value, style)


# Within so much the operations of a token count as equal.
EQUAL = 0.02


def best_twin(row, rows):
    """The best dense row of as many operations, None if there is none."""
    own = row.found[0]["operations"]
    dense = [
        r
        for r in rows
        if not r.is_mixture and abs(r.found[0]["operations"] / own - 1) <= EQUAL
    ]
    return min(dense, key=lambda r: r.mean("perplexity"), default=None)


def at_the_end(rows):
    """A row for each arm."""
    columns = ["arm", "seeds", "operations", "parameters", "validation", "test"]
    columns += ["fewer than dense", "on test text", "overtakes at"]
    columns += ["BLEU, greedy", "test BLEU", "CPU seconds"]
    lines = []
    for row in rows:
        best = best_twin(row, rows)
        overtakes = ""
        if best and row.is_mixture:
            overtakes = overtaking(row.curve(), best.curve())
        lines.append(
            [
                row.title,
                len(row.found),
                f"{row.found[0]['operations']:,}",
                f"{row.found[0]['parameters']:,}",
                with_spread(row, "perplexity"),
                with_spread(row, "test_perplexity"),
                fewer(row, best, "perplexity"),
                fewer(row, best, "test_perplexity"),
                overtakes,
                number(row.mean("bleu"), ".1f"),
                number(row.mean("test_bleu"), ".1f"),
                number(row.mean("training_cpu_seconds"), ".0f"),
            ]
        )
    return table(columns, lines)


def with_spread(row, name):
    """The mean of a figure, and its standard deviation over several seeds."""
    mean = row.mean(name)
    if mean is None or len(row.found) == 1:
        return number(mean)
    return f"{mean:.2f} (sd {np.std([r[name] for r in row.found]):.2f})"


def fewer(row, dense, name):
    """How much less a perplexity is than that of the dense row, if both have it."""
    found = [r and r.mean(name) for r in (row, dense)]
    return "" if None in found else f"{1 - found[0] / found[1]:.1%}"


def by_points(rows):
    """Validation perplexity of every arm at each point."""
    curves = [row.curve() for row in rows]
    points = rows[0].found[0]["curve"]
    lines = [
        [f"{p['tokens']:,}", f"{p['pairs']:,}" if "pairs" in p else ""]
        + [number(values[i]) for _, values in curves]
        for i, p in enumerate(points)
    ]
    return table(["tokens", "pairs", *(row.title for row in rows)], lines)


def by_set(rows):
    """BLEU and perplexity of every test set, and how they were measured."""
    measured = [row for row in rows if all("test" in r for r in row.found)]
    if not measured:
        return None
    sets = measured[0].found[0]["test"]

    def mean(row, name, figure):
        return np.mean([r["test"][name][figure] for r in row.found])

    lines = []
    for name in sets:
        cells = [
            f"{mean(row, name, 'bleu'):.1f} ({mean(row, name, 'perplexity'):.2f})"
            for row in measured
        ]
        lines.append([name, f"{sets[name]['sentences']:,}", *cells])
    if len(sets) > 1:
        cells = [
            f"{row.mean('test_bleu'):.1f} ({row.mean('test_perplexity'):.2f})"
            for row in measured
        ]
        lines.append(["mean BLEU (perplexity of all)", "", *cells])
    columns = ["test set, BLEU (perplexity)", "sentences"]
    signatures = sorted({s["bleu_signature"] for s in sets.values()})
    return "\n\n".join(
        [
            table([*columns, *(row.title for row in measured)], lines),
            "Signatures: " + ", ".join(f"`BLEU|{s}`" for s in signatures) + ".",
        ]
    )


def of_experts(rows):
    """What the gates do at the end: choices that noise leaves, and the load."""
    lines = []
    for row in rows:
        last = [results["curve"][-1] for results in row.found]
        layers = [
            key.removesuffix("_load_cv")
            for key in last[0]
            if key.endswith("_load_cv") and not key.startswith("training_")
        ]
        for layer in layers:
            keys = [f"training_{layer}_choices_kept", f"{layer}_max_over_mean_load"]
            keys += [f"{layer}_load_cv"]
            values = [
                np.mean([p[key] for p in last]) if all(key in p for p in last) else None
                for key in keys
            ]
            styles = (".0%", ".2f", ".2f")
            lines.append([row.title, layer, *map(number, values, styles)])
    columns = ["arm", "layer", "choices kept", "max/mean load", "load CV"]
    return table(columns, lines) if lines else None


def overtaking(curve, other):
    """From which point on a curve stays below another."""
    tokens, values = curve
    above = np.flatnonzero(values >= other[1])
    first = above[-1] + 1 if len(above) else 0
    return f"{tokens[first]:,}" if first < len(tokens) else "never"


def draw(path, records):
    """Perplexity by tokens, and beside it BLEU or the number of experts.

    A picture for each comparison: the second one has a 2 in its name. Mixtures of one
    number of experts are not drawn by it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    for i, rows in enumerate(comparisons(records).values()):
        has_bleu = all("bleu" in row.found[0] for row in rows)
        sizes = {row.settings["num_experts"] for row in rows if row.is_mixture}
        columns = 2 if has_bleu or len(sizes) > 1 else 1
        figure = Figure(figsize=(5 * columns, 4), dpi=120, layout="constrained")
        left, right = figure.subplots(1, columns, squeeze=False)[0][[0, -1]]
        draw_curves(left, rows, "perplexity", "validation perplexity")
        left.set_yscale("log")
        left.yaxis.set_major_formatter(ScalarFormatter())
        left.yaxis.set_minor_formatter(ScalarFormatter())
        if has_bleu:
            draw_curves(right, rows, "bleu", "validation BLEU, greedy")
        elif columns == 2:
            draw_by_experts(right, rows)
        for axes in {left, right}:
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path if i == 0 else path.with_stem(f"{path.stem}_{i + 1}")
        figure.savefig(own)
        print(f"\nPicture: {own}")


def draw_curves(axes, rows, figure, label):
    for row in rows:
        tokens, values = row.curve(figure)
        style = "-" if row.is_mixture else "--"
        axes.plot(tokens / 1e6, values, style, marker=".", label=row.title)
    axes.set(xlabel="tokens (millions)", ylabel=label)


def draw_by_experts(axes, rows):
    """Perplexity at the end: mixtures by their experts, dense models as lines."""
    mixtures, sizes = {}, set()
    for i, row in enumerate(rows):
        final = row.mean("perplexity")
        if row.is_mixture:
            size = row.settings["num_experts"]
            kind = row.name.rpartition("_")[0]
            mixtures.setdefault(kind, (f"C{i}", []))[1].append((size, final))
            sizes.add(size)
        else:
            axes.axhline(final, color=f"C{i}", linestyle="--", label=row.title)
    for kind, (color, points) in mixtures.items():
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=kind)
    axes.set(xlabel="experts", ylabel="validation perplexity at the end")
    axes.set_xscale("log")
    axes.set_xticks(sorted(sizes), map(str, sorted(sizes)))
    axes.minorticks_off()
