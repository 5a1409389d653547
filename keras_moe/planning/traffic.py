"""What a training step moves and computes on the busiest device, and how long."""

import dataclasses

from keras_moe.distribution.topology import exchange_bytes
from keras_moe.models.counting import Count
from keras_moe.models.presets import Preset
from keras_moe.planning.cluster import Cluster
from keras_moe.planning.placing import Placement

# A training step does the operations of the forward pass three times, a multiply-add
# being two: outputs, gradients of inputs, gradients of weights.
_TRAINING = 6
# Operations of an expert that a device starts one after the other in a step: two
# products, their activation, their gradients, and what moves rows.
_LAUNCHES_PER_EXPERT = 16
# Times that a step reads or writes a weight and its gradient: forward, backward,
# gradient written and read, weight read and written.
_WEIGHT_PASSES = 6


@dataclasses.dataclass(frozen=True)
class Work:
    """What a device has to do in one step.

    Attributes:
        dense_operations: Multiply-adds of a token outside of experts, forward, the
            softmax of training included.
        expert_operations: Multiply-adds of one row of an expert, forward.
        expert_ratio: Multiply-adds of an expert for each number of its input and
            output; the hidden size, by the paper's rule.
        rows_per_expert: Float. Rows of an expert in the global batch, on average.
        exchange_bytes: Int. Bytes of expert inputs, outputs and their gradients
            that leave a device, of all mixtures.
        vocabulary_bytes: Int. Bytes of words' vectors that leave a device.
        reduction_bytes: Int. Bytes of dense gradients that leave a device.
    """

    dense_operations: float
    expert_operations: int
    expert_ratio: float
    rows_per_expert: float
    exchange_bytes: int
    vocabulary_bytes: int
    reduction_bytes: int


def softmax_operations(preset: Preset) -> int:
    """Multiply-adds of the softmax of one token in training: of the candidates."""
    if preset.num_sampled is None:
        return preset.vocabulary_size * preset.units
    return (preset.num_sampled + 1) * preset.units


def work_of(
    preset: Preset, count: Count, placement: Placement, batch_tokens: int
) -> Work:
    """Work of one device in a step.

    Args:
        preset: A `Preset`.
        count: Its counts.
        placement: Where its weights live.
        batch_tokens: Int. Tokens of the global batch.

    Returns:
        The `Work`.
    """
    experts = count.operations["experts"]
    dense = sum(count.operations.values()) - experts - count.operations["softmax"]
    devices = placement.num_devices
    d = preset.units
    one = 2 * d * preset.hidden_units if preset.middle == "moe" else 0
    if preset.middle != "moe":
        dense, experts = dense + experts, 0
    tokens = batch_tokens / devices
    away = (devices - 1) / devices
    words = 0.0
    if placement.vocabulary_sharded:
        # Vectors of inputs and targets come and their gradients go; candidates
        # come to every device, their gradients are summed.
        words = 4 * tokens * d + 3 * (preset.num_sampled or 0) * d
    elif preset.num_sampled is not None:
        # Every device gets the gradients of all words of the global batch.
        words = (2 * batch_tokens + devices * preset.num_sampled) * d
    replicated = sum(count.parameters[p] for p in ("lstm", "gating"))
    if preset.middle != "moe":
        replicated += count.parameters["experts"]
    if preset.num_sampled is None and not placement.vocabulary_sharded:
        replicated += count.parameters["softmax"]
    return Work(
        dense_operations=dense + softmax_operations(preset),
        expert_operations=one,
        expert_ratio=one / (2 * d),
        rows_per_expert=(
            batch_tokens * preset.experts_per_token / preset.num_experts if one else 0.0
        ),
        exchange_bytes=preset.num_mixtures
        * exchange_bytes(batch_tokens, preset.experts_per_token, d, 4, devices),
        vocabulary_bytes=round(4 * words * away),
        # A ring: each part is summed on its way round, then goes round again.
        reduction_bytes=round(4 * 2 * replicated * away),
    )


def step_seconds(
    preset: Preset,
    work: Work,
    placement: Placement,
    cluster: Cluster,
    batch_tokens: int,
    recompute: bool,
    imbalance: float,
) -> dict[str, float]:
    """Seconds of each part of a step on the busiest device.

    The parts follow each other: nothing overlaps.

    Args:
        preset: A `Preset`.
        work: From `work_of`.
        placement: Where its weights live.
        cluster: A `Cluster`.
        batch_tokens: Int. Tokens of the global batch.
        recompute: Bool. Whether hidden activations are computed twice.
        imbalance: Float. Rows of the busiest device over the mean of those that
            have equally many experts.

    Returns:
        Dict with `dense`, `experts`, `weights` (reading and writing them and their
        state), `launches` (starting the experts' operations), `exchange`,
        `vocabulary`, `reduction`.
    """
    devices = placement.num_devices
    tokens = batch_tokens / devices
    most = placement.most_experts
    rows = work.rows_per_expert * most * imbalance * preset.num_mixtures
    per_row = (_TRAINING + (2 if recompute else 0)) * work.expert_operations
    weights = 4 * most * work.expert_operations * preset.num_mixtures
    launches = most * _LAUNCHES_PER_EXPERT * preset.num_mixtures

    def exchange(sent):
        return cluster.exchange_seconds(sent, devices) if sent else 0.0

    # Four exchanges, each with a message to every other device.
    quarter = work.exchange_bytes * imbalance / 4
    return {
        "dense": _TRAINING * work.dense_operations * tokens / cluster.flops,
        "experts": rows * per_row / cluster.flops,
        "weights": _WEIGHT_PASSES * weights / (cluster.memory_gb_per_second * 1e9),
        "launches": launches * cluster.launch_microseconds * 1e-6,
        "exchange": 4 * exchange(quarter),
        "vocabulary": exchange(work.vocabulary_bytes),
        "reduction": exchange(work.reduction_bytes),
    }
