"""The verdict of a plan of a user's own model, in plain sentences."""

from collections.abc import Iterator
from typing import Any

_NAMES = {
    "dense": "the products of dense layers",
    "experts": "the experts' products",
    "weights": "reading and writing the experts' weights",
    "elementwise": "reading and writing what lies between products",
    "launches": "starting operations",
    "exchange": "sending rows to experts and back",
    "reduction": "summing gradients over the devices",
}


def advise(plan: Any) -> list[str]:
    """Says whether a plan works, what bounds it, and what would help.

    Args:
        plan: A `ModelPlan`.

    Returns:
        Sentences, the verdict first.
    """
    return [_verdict(plan), *_groups(plan), *_memory(plan), *_routing(plan)]


def _verdict(plan):
    memory = plan.memory.peak / 1e9
    fits = "fits" if plan.fits else "does not fit"
    return (
        f"{plan.batch_size:,} examples a device: it {fits} on {plan.num_devices:,} x "
        f"{plan.cluster.device}, {memory:.2f} of {plan.cluster.memory_gb:g} GB. A step "
        f"takes about {plan.step_time:.3g} s; most of it, "
        f"{plan.seconds[plan.bound] / plan.step_time:.0%}, is {_NAMES[plan.bound]}."
    )


def _groups(plan) -> Iterator[str]:
    if plan.num_devices == 1 or not plan.measures.num_experts:
        return
    size, groups = plan.expert_parallel_size, plan.groups
    fastest = min(groups, key=lambda n: groups[n].step_time)
    yield (
        f"Groups of {size:,} devices hold all experts (`expert_parallel_size={size}`): "
        f"{groups[size].memory.peak / 1e9:.2f} GB and "
        f"{groups[size].step_time:.3g} s a step."
    )
    if fastest != size:
        fits = "" if groups[fastest].fits else ", but do not fit"
        yield (
            f"Groups of {fastest:,} would be faster, {groups[fastest].step_time:.3g} s"
            f"{fits}."
        )


def _memory(plan) -> Iterator[str]:
    if plan.fits:
        if plan.most_batch_size >= 2 * plan.batch_size:
            yield (
                f"About {plan.most_batch_size:,} examples a device fit: a bigger batch "
                "makes better use of weights and network."
            )
        return
    if plan.most_batch_size:
        yield (
            f"A smaller batch: about {plan.most_batch_size:,} examples a device fit; sum "
            "gradients over several of them."
        )
    else:
        yield "Not even one example fits a device, since weights and update do not."
    smallest = min(plan.groups, key=lambda n: plan.groups[n].memory.peak)
    if plan.groups[smallest].fits and smallest != plan.expert_parallel_size:
        yield f"Groups of {smallest:,} devices fit: `expert_parallel_size={smallest}`."
    elif plan.measures.num_experts and plan.min_devices > plan.num_devices:
        yield (
            f"More devices: weights, slots and gradients need groups of at least "
            f"{plan.min_devices:,}."
        )
    mixtures = [m for m in plan.measures.mixtures if m.is_sharded]
    if mixtures and not any(m.recompute for m in mixtures):
        saved = plan.memory.peak - plan.other_memory.peak
        if saved > 0.03 * plan.memory.peak:
            yield f"`recompute=True` of the experts saves {saved / 1e9:.2f} GB."


def _routing(plan) -> Iterator[str]:
    rows, size = plan.measures.expert_activations, plan.expert_parallel_size
    if size > 1 and plan.measures.num_experts:
        yield (
            f"If all tokens went to one device of a group, their rows would take "
            f"{size * rows / 1e9:.2f} GB there instead of {rows / 1e9:.2f}; "
            f"`capacity_factor=1.25` bounds them to {1.25 * rows / 1e9:.2f} GB and drops "
            "what is beyond."
        )
    if plan.measures.assumed:
        yield (
            "Sizes that depend on data were assumed (nothing is masked) "
            f"for {', '.join(plan.measures.assumed)}."
        )
