"""What experts have specialized in, as text, CSV and HTML."""

import csv
import html
import io

import numpy as np

from keras_moe.telemetry.specialization import Specialization

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem;
       padding: 0 1rem; color: #1d2733; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
p.note { color: #52616f; }
section { border: 1px solid #d8dfe6; border-radius: 6px; padding: .8rem 1rem;
          margin: 1rem 0; }
.load { color: #52616f; font-weight: normal; }
.bar { display: inline-block; height: .6rem; background: #2a6f97; border-radius: 2px;
       vertical-align: middle; margin-left: .4rem; }
.words span { background: #eef3f7; border-radius: 3px; padding: 0 .35rem;
              margin-right: .3rem; display: inline-block; }
table { border-collapse: collapse; width: 100%; table-layout: fixed;
        font-size: .9rem; margin-top: .5rem; }
td { padding: .1rem .3rem; white-space: nowrap; overflow: hidden; }
/* A context that is too long is cut on the far side of the word. */
td.before { direction: rtl; text-align: right; }
td.word { font-weight: 600; color: #c8553d; text-align: center; width: 9rem; }
td.gate { width: 3rem; color: #52616f; font-variant-numeric: tabular-nums; }
nav a { display: inline-block; min-width: 2rem; text-align: right; }
"""


def information_text(found: Specialization) -> str:
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


def as_text(found: Specialization) -> str:
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


def as_csv(found: Specialization) -> str:
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


def as_html(found: Specialization) -> str:
    """A page that stands by itself, without scripts."""
    order = by_load(found)
    title = html.escape(f"What the experts of {found.name} take")
    links = " ".join(f'<a href="#e{expert}">{expert}</a>' for expert in order)
    note = html.escape(information_text(found))
    sections = "\n".join(_section(found, expert) for expert in order)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">{len(order)} experts, the busiest first. Of each: its share of the tokens,
the words it took most often, and the contexts in which its gate was largest. {note}</p>
<nav>{links}</nav>
{sections}
</body>
</html>
"""


def by_load(found: Specialization) -> list[int]:
    """Experts, the busiest first."""
    return np.argsort(-found.counts, kind="stable").tolist()


def _load(found, expert):
    mean = max(found.counts.mean(), 1e-30)
    share = found.counts[expert] / max(found.counts.sum(), 1)
    return (
        f"{found.counts[expert]:,} tokens, {share:.1%} of the load, "
        f"{found.counts[expert] / mean:.2f} times the mean"
    )


def _section(found, expert):
    width = 8 * found.counts[expert] / max(found.counts.max(), 1)
    words = "".join(
        f"<span>{html.escape(word)} <small>{count:,}</small></span>"
        for word, count in found.words[expert]
    )
    rows = "\n".join(
        f'<tr><td class="gate">{c.gate:.2f}</td>'
        f'<td class="before"><bdi>{html.escape(c.before)}</bdi></td>'
        f'<td class="word">{html.escape(c.word)}</td>'
        f"<td>{html.escape(c.after)}</td></tr>"
        for c in found.contexts[expert]
    )
    return f"""<section id="e{expert}">
<h2>Expert {expert} <span class="load">{_load(found, expert)}
<span class="bar" style="width: {width:.2f}rem"></span></span></h2>
<div class="words">{words}</div>
<table>
{rows}
</table>
</section>"""
