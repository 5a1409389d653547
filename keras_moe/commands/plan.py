"""Plans a model, or a preset of the paper, on a cluster: tables, pictures, a verdict."""

import dataclasses
from pathlib import Path

from rich.console import Console

from keras_moe import models, planning
from keras_moe.commands import folders, pictures
from keras_moe.commands.options import PlanOptions
from keras_moe.planning import model_report, report

_ALL = "all"


def run(options: PlanOptions) -> list[planning.Plan | planning.ModelPlan]:
    """Plans, prints, and draws.

    Args:
        options: See `PlanOptions`.

    Returns:
        The plans, one for each preset, or that of the model.

    Raises:
        FileNotFoundError: There is no such cluster, or no such file of a model.
        ValueError: An option is out of range, or `output_dir` cannot be written.
    """
    if options.output_dir is not None:
        folders.verify_writable(Path(options.output_dir), "output_dir")
    if options.model is not None:
        plans = [_planned(options, _load_model(options.model))]
    else:
        names = models.preset_names() if options.preset == _ALL else [options.preset]
        plans = [_planned(options, name) for name in names]
    # Tables do not break; a terminal that is narrower breaks lines by itself.
    console = Console(width=max(100, Console().width))
    if options.model is not None:
        _print_model(plans[0], console)
    elif options.preset == _ALL:
        console.print(report.comparison_table(plans))
    else:
        _print_one(plans[0], console)
    scaled = []
    if options.scaling is not None:
        scaled = [planning.scaling(plan, options.scaling) for plan in plans]
        for each in scaled:
            console.print(model_report.scaling_table(each))
            console.print(f"* {each.name}: {each.sentence}", highlight=False)
    _print_assumptions(plans, console)
    if options.output_dir is not None:
        folder = Path(options.output_dir)
        folders.make_folder(folder, "output_dir")
        folders.write_json(folder / "plan.json", [figures(p) for p in plans])
        written = [(folder / "plan.json", "the figures")]
        written += pictures.draw_plans(plans, folder / "plan.png")
        if scaled:
            rows = [
                {"name": s.name, "points": [p._asdict() for p in s.points]}
                for s in scaled
            ]
            folders.write_json(folder / "scaling.json", rows)
            written += [(folder / "scaling.json", "figures of more devices")]
            written += pictures.draw_scaling(scaled, folder / "scaling.png")
        for path, text in written:
            console.print(f"{path}: {text}", highlight=False)
    return plans


def _planned(options, model):
    """The plan of a preset by its name, or of a model."""
    return planning.plan(
        model,
        options.cluster,
        num_devices=options.num_devices,
        batch_tokens=options.batch_tokens,
        recompute=True if options.recompute else None,
        expert_optimizer=options.expert_optimizer,
        shard_vocabulary=options.shard_vocabulary,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        optimizer=options.optimizer,
        expert_parallel_size=options.expert_parallel_size,
    )


def _load_model(path):
    if not Path(path).is_file():
        raise FileNotFoundError(
            "`model` must be a .keras file. Received: "
            f"model={path!r}, which is no file."
        )
    import keras

    return keras.saving.load_model(path)


def _print_model(plan, console):
    console.print(
        f"{plan.name}: {plan.memory.weights / 1e9:,.2f} GB of weights a device, "
        f"{plan.batch_size:,} examples each",
        highlight=False,
    )
    console.print(model_report.memory_table(plan))
    if plan.measures.num_experts and plan.num_devices > 1:
        console.print(model_report.groups_table(plan))
    console.print(report.time_table(plan))
    presets = [planning.plan(name, plan.cluster) for name in models.preset_names()]
    near = model_report.nearest_presets(plan, presets)
    console.print(report.comparison_table([plan, *near]))
    for sentence in plan.advice:
        console.print(f"* {sentence}", highlight=False)


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
    preset = getattr(plans[0], "preset", None)
    if len(plans) == 1 and preset is not None and preset.assumed:
        console.print(
            "The paper leaves open: " + ", ".join(preset.assumed) + ".",
            style="dim",
            highlight=False,
        )


def figures(plan: planning.Plan | planning.ModelPlan) -> dict:
    """The figures of a plan, for JSON."""
    if isinstance(plan, planning.ModelPlan):
        return _figures_of_model(plan)
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


def _figures_of_model(plan):
    return {
        "model": plan.name,
        "cluster": plan.cluster.name,
        "num_devices": plan.num_devices,
        "min_devices": plan.min_devices,
        "batch_size": plan.batch_size,
        "optimizer": plan.optimizer,
        "expert_parallel_size": plan.expert_parallel_size,
        **dataclasses.asdict(plan.memory),
        "peak": plan.memory.peak,
        "fits": plan.fits,
        "groups": {
            size: {
                "peak": group.memory.peak,
                "exchange_bytes": group.exchange_bytes,
                "reduction_bytes": group.reduction_bytes,
                "seconds": group.seconds,
                "fits": group.fits,
            }
            for size, group in plan.groups.items()
        },
        "work": plan.measures.work,
        "seconds": plan.seconds,
        "step_time": plan.step_time,
        "bound": plan.bound,
        "tflops": plan.tflops,
        "advice": plan.advice,
    }
