"""A plan as tables."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from keras_moe.planning.model_plan import ModelPlan
from keras_moe.planning.planner import Plan

_PARTS = ("embedding", "lstm", "gating", "experts", "attention", "softmax")


def gigabytes(size: float) -> str:
    """`2150000000` -> `"2.15"`."""
    return f"{size / 1e9:,.2f}"


def memory_table(plan: Plan) -> Table:
    """Memory of the busiest device, by part of the model."""
    table = make_table(
        f"Memory of the busiest of {plan.num_devices:,} devices (GB)",
        ["part", "weights", "slots", "gradients", "activations", "other recompute"],
    )
    memory = plan.memory
    columns = [
        memory.weights,
        memory.slots,
        memory.gradients,
        memory.activations,
        plan.other_memory.activations,
    ]
    for part in _PARTS:
        sizes = [column.get(part, 0) for column in columns]
        if any(sizes):
            table.add_row(part, *map(gigabytes, sizes))
    table.add_section()
    table.add_row("all", *(gigabytes(sum(c.values())) for c in columns))
    table.caption = (
        f"peak {gigabytes(memory.peak)} of {plan.cluster.memory_gb:g} GB; the last "
        f"column is with recompute={not plan.preset.recompute}"
    )
    return table


def time_table(plan: Plan) -> Table:
    """Seconds of a step, by what takes them."""
    table = make_table("A training step", ["part", "seconds", "share"])
    for part, seconds in plan.seconds.items():
        table.add_row(part, f"{seconds:.3g}", f"{seconds / plan.step_time:.0%}")
    table.add_section()
    table.add_row("all", f"{plan.step_time:.3g}", f"{plan.tflops:.2f} TFLOPS a device")
    return table


def mixture_table(plan: Plan) -> Table:
    """Where experts live and what travels."""
    table = make_table("Experts", ["", ""])
    placement, work, preset = plan.placement, plan.work, plan.preset
    rows = [
        ("mixtures", f"{preset.num_mixtures}"),
        ("experts of a mixture", f"{preset.num_experts:,}"),
        ("groups", f"{preset.num_groups or 1:,}"),
        ("experts on the first device", _span(placement.experts_of(0))),
        (
            "experts on the last device",
            _span(placement.experts_of(plan.num_devices - 1)),
        ),
        ("devices without experts", f"{placement.idle_devices:,}"),
        ("rows of an expert in a batch", f"{work.rows_per_expert:,.0f}"),
        ("all-to-all, sent by a device (GB a step)", gigabytes(work.exchange_bytes)),
        ("words' vectors, sent (GB a step)", gigabytes(work.vocabulary_bytes)),
        ("dense gradients, sent (GB a step)", gigabytes(work.reduction_bytes)),
        ("multiply-adds a number: every mixture", f"{work.expert_ratio:,.0f}"),
        ("multiply-adds a number: the device", f"{plan.device_ratio:,.0f}"),
        ("least devices for the parameters", f"{plan.min_devices:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def comparison_table(plans: Sequence[Plan | ModelPlan]) -> Table:
    """One row for each plan, with the paper's figure where it has one."""
    names = ["plan", "devices", "least", "parameters", "peak", "step", "bound"]
    table = make_table(
        f"On {plans[0].cluster.device}: GB of the busiest device, seconds, TFLOPS",
        [*names, "TFLOPS", "paper"],
    )
    for plan in plans:
        reported = (
            plan.preset.reported.get("tflops") if isinstance(plan, Plan) else None
        )
        table.add_row(
            plan.name,
            f"{plan.num_devices:,}",
            f"{plan.min_devices:,}",
            gigabytes(plan.memory.parameters),
            gigabytes(plan.memory.peak),
            f"{plan.step_time:.3g}",
            plan.bound,
            f"{plan.tflops:.2f}",
            "" if reported is None else f"{reported:.2f}",
        )
    return table


def make_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table of columns, the first of text, the others of numbers."""
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for number, column in enumerate(columns):
        kwargs: dict[str, Any] = {} if number == 0 else {"justify": "right"}
        table.add_column(column, no_wrap=True, **kwargs)
    return table


def _span(experts: range) -> str:
    return f"{experts.start:,} to {experts.stop - 1:,}" if experts else "none"
