"""Plans a preset of the paper on a cluster: tables, a picture, a verdict."""

from pathlib import Path

from rich.console import Console

from keras_moe import models, planning
from keras_moe.commands import folders, pictures
from keras_moe.commands.options import PlanOptions
from keras_moe.planning import report

_ALL = "all"


def run(options: PlanOptions) -> list[planning.Plan]:
    """Plans, prints, and draws.

    Args:
        options: See `PlanOptions`.

    Returns:
        The plans, one for each preset.

    Raises:
        FileNotFoundError: There is no such cluster.
        ValueError: An option is out of range, or `output_dir` cannot be written.
    """
    if options.output_dir is not None:
        folders.verify_writable(Path(options.output_dir), "output_dir")
    names = models.preset_names() if options.preset == _ALL else [options.preset]
    plans = [
        planning.plan(
            name,
            options.cluster,
            num_devices=options.num_devices,
            batch_tokens=options.batch_tokens,
            recompute=True if options.recompute else None,
            expert_optimizer=options.expert_optimizer,
            shard_vocabulary=options.shard_vocabulary,
        )
        for name in names
    ]
    # Tables do not break; a terminal that is narrower breaks lines by itself.
    console = Console(width=max(100, Console().width))
    if options.preset == _ALL:
        console.print(report.comparison_table(plans))
    else:
        _print_one(plans[0], console)
    _print_assumptions(plans, console)
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        folders.make_folder(folder, "output_dir")
        folders.write_json(folder / "plan.json", [figures(p) for p in plans])
        written = [(folder / "plan.json", "the figures")]
        written += pictures.draw_plans(plans, folder / "plan.png")
        for path, text in written:
            console.print(f"{path}: {text}", highlight=False)
    return plans


def _print_one(plan, console):
    preset = plan.preset
    parameters = models.count(preset).total_parameters
    console.print(
        f"{preset.name}: {parameters:,} parameters, {plan.batch_tokens:,} tokens a "
        f"batch, {preset.batch_tokens / plan.num_devices:,.0f} a device",
        highlight=False,
    )
    console.print(report.memory_table(plan))
    if preset.middle == "moe":
        console.print(report.mixture_table(plan))
    console.print(report.time_table(plan))
    for sentence in plan.advice:
        console.print(f"* {sentence}", highlight=False)


def _print_assumptions(plans, console):
    cluster = plans[0].cluster
    for source in cluster.sources:
        console.print(f"{cluster.name}: {source}", style="dim", highlight=False)
    if len(plans) == 1 and plans[0].preset.assumed:
        console.print(
            "The paper leaves open: " + ", ".join(plans[0].preset.assumed) + ".",
            style="dim",
            highlight=False,
        )


def figures(plan: planning.Plan) -> dict:
    """The figures of a plan, for JSON."""
    memory = plan.memory
    return {
        "preset": plan.preset.name,
        "cluster": plan.cluster.name,
        "num_devices": plan.num_devices,
        "min_devices": plan.min_devices,
        "batch_tokens": plan.batch_tokens,
        "weights": memory.weights,
        "slots": memory.slots,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "activations_with_other_recompute": plan.other_memory.activations,
        "peak": memory.peak,
        "fits": plan.fits,
        "experts_on_the_busiest_device": plan.placement.most_experts,
        "rows_per_expert": plan.work.rows_per_expert,
        "exchange_bytes": plan.work.exchange_bytes,
        "expert_ratio": plan.work.expert_ratio,
        "device_ratio": plan.device_ratio,
        "seconds": plan.seconds,
        "step_time": plan.step_time,
        "bound": plan.bound,
        "tflops": plan.tflops,
        "advice": plan.advice,
    }
