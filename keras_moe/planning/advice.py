"""The verdict of a plan, and what to change, in plain sentences."""

from typing import Any

_NAMES = {
    "dense": "the dense layers and the softmax",
    "experts": "the experts' products",
    "weights": "reading and writing the experts' weights",
    "launches": "starting operations of many small experts",
    "exchange": "sending rows to experts and back",
    "vocabulary": "sending the words' vectors",
    "reduction": "summing gradients over the devices",
}
# Rows from which a product of an expert keeps a device busy.
_FEW_ROWS = 64


def advise(plan: Any) -> list[str]:
    """Says whether a plan works, what bounds it, and what would help.

    Args:
        plan: A `Plan`.

    Returns:
        Sentences, the verdict first.
    """
    return [_verdict(plan), *_memory(plan), *_time(plan)]


def _verdict(plan):
    where = f"{plan.num_devices:,} x {plan.cluster.device}"
    used = f"{plan.memory.peak / 1e9:.1f} of {plan.cluster.memory_gb:g} GB"
    bound = (
        f"A step takes about {plan.step_time:.3g} s; most of it, "
        f"{plan.seconds[plan.bound] / plan.step_time:.0%}, is {_NAMES[plan.bound]}."
    )
    if plan.fits:
        return f"It fits on {where}: {used}. {bound}"
    if plan.parameters_fit:
        return (
            f"Weights, optimizer and gradients fit on {where}, but not the "
            f"activations of {plan.batch_tokens:,} tokens: {used}. {bound}"
        )
    return f"It does not fit on {where}: {used}. {bound}"


def _memory(plan):
    memory, preset = plan.memory, plan.preset
    if not plan.parameters_fit:
        if plan.min_devices:
            yield (
                f"More devices: weights, slots and gradients need at least "
                f"{plan.min_devices:,}."
            )
        else:
            yield (
                "No number of devices is enough: what every device holds is too "
                "large. Shard the vocabulary, or make the dense layers narrower."
            )
        if preset.middle == "moe" and preset.expert_optimizer == "adam":
            saved = memory.slots["experts"]
            yield (
                f"FactoredAdam saves nearly all of {saved / 1e9:.1f} GB of optimizer "
                "state of the experts."
            )
    elif not plan.fits:
        if plan.most_tokens:
            yield (
                f"A smaller batch: {plan.most_tokens:,} tokens a device fit; sum "
                "gradients over several of them, or use more devices."
            )
        else:
            yield (
                "Not even a small batch fits, since the update and gradients that "
                "are being put together need room as well: more devices."
            )
        largest = max(memory.activations, key=lambda part: memory.activations[part])
        if largest == "softmax":
            yield (
                f"The softmax takes {memory.activations['softmax'] / 1e9:.1f} GB of "
                "the activations: fewer candidates, or fewer tokens at a time."
            )
    saved = sum(plan.memory.activations.values()) - sum(
        plan.other_memory.activations.values()
    )
    if not plan.fits and saved > 0.05 * plan.cluster.memory:
        yield f"`recompute=True` of the experts saves {saved / 1e9:.1f} GB."
    words = memory.variables_and_slots - sum(
        memory.weights[part] + memory.slots[part]
        for part in memory.weights
        if part not in ("embedding", "softmax")
    )
    if not plan.placement.vocabulary_sharded and words > 0.25 * plan.cluster.memory:
        yield (
            f"The vocabulary takes {words / 1e9:.1f} GB of every device, since each "
            "holds all of it; sharded (`distribution.shard_vocabulary`) it would take "
            f"{words / plan.num_devices / 1e9:.2f} GB."
        )
    if plan.placement.idle_devices:
        yield (
            f"{plan.placement.idle_devices:,} of {plan.num_devices:,} devices have no "
            "expert: fewer devices, or more experts (more groups, if hierarchical)."
        )


def _time(plan):
    preset, work = plan.preset, plan.work
    if preset.middle != "moe":
        return
    if plan.num_devices > 1 and work.expert_ratio < plan.device_ratio:
        yield (
            f"An expert does {work.expert_ratio:,.0f} multiply-adds for each number "
            f"it takes or gives, its hidden size; a device does "
            f"{plan.device_ratio:,.0f} while it sends one. Wider experts, of at "
            f"least {plan.device_ratio:,.0f} hidden units, or the network bounds them."
        )
    if work.rows_per_expert < _FEW_ROWS or plan.bound in ("weights", "launches"):
        yield (
            f"An expert gets {work.rows_per_expert:,.0f} rows of a batch, for which "
            "its weights are read and written once: a bigger batch makes better use "
            "of them. Raise it with the number of experts."
        )
    if preset.num_groups is None and preset.num_experts >= 512:
        yield (
            f"A gate over {preset.num_experts:,} experts: a hierarchical mixture "
            f"(about {round(preset.num_experts**0.5):,} groups) makes it cheap."
        )
