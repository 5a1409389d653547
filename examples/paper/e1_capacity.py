"""E1: more experts at equal operations of a token (table 7, figure 2).

    python examples/paper/e1_capacity.py

Mixtures of 4, 16 and 64 experts of which a token takes 4, and two dense layers of as
many operations: one wide expert, and one deep expert.

Checks: each fourfold number of experts takes at least 15 % off the perplexity; with 4
of 4 experts a mixture is no better or worse than the wide expert by more than 10 %; all
spend equal operations in their experts, to 10 %. Gates come on top: their cost grows
with the number of experts, and at this width, 32, 64 experts' gates cost half of what
the experts do. The table shows it.
"""

import experiment
from arms import Arm

SIZES = (4, 16, 64)


def plan(seed, without):
    sizes = {n: 4 if without == "capacity" else n for n in SIZES}
    return {
        "MoE-1-Wide": Arm("wide", 1, seed=seed),
        "MoE-1-Deep": Arm("deep", 1, seed=seed),
        **{f"MoE-{n}": Arm(num_experts=size, seed=seed) for n, size in sizes.items()},
    }


def check(found):
    perplexity = {title: result["perplexity"] for title, result in found.items()}
    operations = [result["expert_operations"] for result in found.values()]
    few, some, many = (perplexity[f"MoE-{n}"] for n in SIZES)
    wide = perplexity["MoE-1-Wide"]
    return {
        f"16 experts / 4: {some / few:.3f} < 0.85": some / few < 0.85,
        f"64 experts / 16: {many / some:.3f} < 0.85": many / some < 0.85,
        f"MoE-4 / wide: {few / wide:.3f} within 10 %": abs(few / wide - 1) < 0.1,
        f"operations of the experts {min(operations):,} to {max(operations):,}": (
            max(operations) < 1.1 * min(operations)
        ),
    }


def draw(axes, everything):
    for seed, found in everything.items():
        axes.plot(
            SIZES,
            [found[f"MoE-{n}"]["perplexity"] for n in SIZES],
            "o-",
            label=f"mixture, seed {seed}",
        )
    for title, style in (("MoE-1-Wide", "--"), ("MoE-1-Deep", ":")):
        values = [found[title]["perplexity"] for found in everything.values()]
        axes.axhline(
            sum(values) / len(values), color="gray", linestyle=style, label=title
        )
    floors = [found["MoE-4"]["floor"] for found in everything.values()]
    axes.axhline(sum(floors) / len(floors), color="black", label="lowest possible")
    axes.set(
        xscale="log",
        xlabel="experts (4 for each token)",
        ylabel="perplexity",
        title="Perplexity at equal operations of the experts",
    )
    axes.set_xticks(SIZES, SIZES)
    axes.legend(fontsize=8)


if __name__ == "__main__":
    experiment.main(
        __doc__,
        plan=plan,
        check=check,
        columns={
            "perplexity": ".3f",
            "expert_operations": ",",
            "gate_operations": ",",
            "parameters": ",",
            "max_over_mean": ".2f",
        },
        causes={"capacity": "every mixture has 4 experts"},
        draw=draw,
    )
