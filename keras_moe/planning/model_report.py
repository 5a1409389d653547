"""A plan of a user's own model, and its scaling, as tables."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from keras_moe.planning.model_plan import ModelPlan
from keras_moe.planning.report import gigabytes, make_table
from keras_moe.planning.weak_scaling import Scaling


def memory_table(plan: ModelPlan) -> Table:
    """Memory of the busiest device."""
    memory = plan.memory
    table = make_table(
        f"Memory of the busiest of {plan.num_devices:,} devices", ["part", "GB"]
    )
    rows = [
        ("weights", memory.weights),
        (f"optimizer ({plan.optimizer})", memory.slots),
        ("batch", memory.inputs),
        ("step, beside these, at most", memory.step),
        ("uneven routing", memory.routing),
    ]
    for name, size in rows:
        table.add_row(name, gigabytes(size))
    table.add_section()
    table.add_row(f"peak, of {plan.cluster.memory_gb:g}", gigabytes(memory.peak))
    table.caption = (
        f"of the step: activations {gigabytes(memory.activations)}, all gradients "
        f"{gigabytes(memory.gradients)}, not all at once"
    )
    return table


def groups_table(plan: ModelPlan) -> Table:
    """What each size of expert-parallel groups means."""
    table = make_table(
        f"Devices that share the experts, of {plan.num_devices:,}",
        [
            "devices",
            "peak GB",
            "rows sent GB",
            "gradients summed GB",
            "s a step",
            "fits",
        ],
    )
    for size, group in plan.groups.items():
        mark = " *" if size == plan.expert_parallel_size else ""
        table.add_row(
            f"{size:,}{mark}",
            gigabytes(group.memory.peak),
            gigabytes(group.exchange_bytes),
            gigabytes(group.reduction_bytes),
            f"{group.step_time:.3g}",
            "yes" if group.fits else "no",
        )
    table.caption = "* planned"
    return table


def scaling_table(scaling: Scaling) -> Table:
    """Throughput on more and more devices."""
    table = make_table(
        f"{scaling.name} on more and more {scaling.cluster.device}, the same batch each",
        [
            "devices",
            "share experts",
            "GB",
            "s after",
            "efficiency",
            "s hidden",
            "efficiency",
        ],
    )
    for point in scaling.points:
        where = "" if point.within_node else " (nodes)"
        table.add_row(
            f"{point.num_devices:,}",
            f"{point.expert_parallel_size:,}{where}",
            gigabytes(point.peak) + ("" if point.fits else " !"),
            f"{point.seconds:.3g}",
            f"{point.efficiency:.0%}",
            f"{point.overlapped_seconds:.3g}",
            f"{point.overlapped_efficiency:.0%}",
        )
    table.caption = (
        "after, hidden: communication after computation, or hidden behind it; "
        "!: does not fit; above 100%: experts are shared out, so that a device reads "
        "fewer weights than one alone"
    )
    return table


def nearest_presets(
    plan: ModelPlan, plans: Sequence[Any], number: int = 3
) -> list[Any]:
    """The presets whose mixtures are nearest in number of experts."""
    experts = max(1, plan.measures.num_experts)

    def distance(other):
        more, less = sorted((max(1, other.preset.num_experts), experts))
        return less / more

    return sorted(plans, key=distance)[:number]
