"""Bytes on the busiest device of a training step, part by part."""

import dataclasses

from keras_moe import checks
from keras_moe.models.counting import Count, count
from keras_moe.models.presets import Preset, as_preset
from keras_moe.planning.placing import Placement

_ITEMSIZE = 4

# Numbers that a step keeps for each token, in the widths of the layers: what the
# backward pass needs, and what it holds at the same time. Those of LSTM and softmax
# follow from TensorFlow's gradients (gates, states and their non-linearities; scores
# and their gradient); the table of docs/benchmarks compares them with measured steps.
_LSTM_CELLS, _LSTM_WIDTHS = 8, 2
_RESIDUAL_WIDTHS = 3
_SCORES, _SAMPLED_SCORES = 1, 2
_GATE_LOGITS = 6
_ROW_WIDTHS = 2
_HIDDEN = 1
# Arrays as large as a weight that its update makes on the way, and how many weights
# are updated at the same time.
_UPDATE_ARRAYS, _UPDATES_AT_ONCE = 2.5, 2
# Bytes that `FactoredAdam` updates at a time.
_FACTORED_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most.

    Attributes:
        weights: Dict of part to bytes.
        slots: Dict of part to bytes of the optimizer.
        gradients: Dict of part to bytes; with a sampled softmax those of the words
            that a step meets.
        activations: Dict of part to bytes at the number of tokens planned.
        stacking: Int. Gradients of experts that are there twice while they are put
            together.
        workspace: Int. What the updates of the largest weights take besides.
    """

    weights: dict[str, int]
    slots: dict[str, int]
    gradients: dict[str, int]
    activations: dict[str, int]
    stacking: int
    workspace: int

    @property
    def variables_and_slots(self) -> int:
        """What stays from step to step."""
        return sum(self.weights.values()) + sum(self.slots.values())

    @property
    def parameters(self) -> int:
        """Weights, slots and gradients: what more tokens do not change."""
        return self.variables_and_slots + sum(self.gradients.values())

    @property
    def peak(self) -> int:
        """The most that a step holds at once.

        Activations go as gradients come: the workspace of the update and the
        activations are not there at the same time.
        """
        backward = sum(self.activations.values()) + self.stacking
        return self.parameters + max(backward, self.workspace)


def memory_of(
    preset: Preset, placement: Placement, tokens: float, rows_over_mean: float = 1.0
) -> Memory:
    """Memory of the device that holds most.

    Args:
        preset: A `Preset`.
        placement: Where its weights live.
        tokens: Float. Tokens of the batch of one device.
        rows_over_mean: Float. Rows of experts on the busiest device over the mean.
            Defaults to `1`.

    Returns:
        The `Memory`.
    """
    preset = as_preset(preset)
    tokens = checks.verify_number(tokens, "tokens")
    counted = count(preset, biases=True)
    held = _held(preset, counted, placement)
    weights = {part: round(_ITEMSIZE * n) for part, n in held.items()}
    slots = {part: 2 * size for part, size in weights.items()}
    if preset.middle == "moe" and preset.expert_optimizer == "factored_adam":
        d, h = preset.units, preset.hidden_units
        experts = placement.most_experts * preset.num_mixtures
        slots["experts"] = _ITEMSIZE * experts * 2 * (d + h)
    gradients = dict(weights)
    words = _gradient_words(preset, placement, tokens)
    for part in ("embedding", "softmax"):
        gradients[part] = min(gradients[part], round(_ITEMSIZE * words[part]))
    activations = {
        part: round(_ITEMSIZE * tokens * n)
        for part, n in activation_numbers(preset, rows_over_mean).items()
    }
    # Recomputed, experts give the gradients of all their kernels at the end.
    share = 1.0 if preset.recompute else 0.5
    stacking = round(share * gradients["experts"] / max(1, preset.num_mixtures))
    return Memory(
        weights,
        slots,
        gradients,
        activations,
        stacking if preset.middle == "moe" else 0,
        _workspace(preset, weights),
    )


def _held(preset: Preset, counted: Count, placement: Placement) -> dict[str, float]:
    """Parameters of each part on the device that holds most."""
    share = placement.vocabulary_share(preset.vocabulary_size)
    held: dict[str, float] = dict(counted.parameters)
    held["embedding"] *= share
    held["softmax"] *= share
    if placement.shards is not None:
        held["experts"] *= placement.most_experts / preset.num_experts
        if preset.num_groups is not None:
            primary = preset.gate_matrices * preset.units
            primary *= preset.num_groups * preset.num_mixtures
            secondary = held["gating"] - primary
            here = placement.most_experts / preset.num_experts
            held["gating"] = primary + secondary * here
    return held


def _gradient_words(preset, placement, tokens):
    """Numbers in the gradients of the vocabulary."""
    d = preset.units
    full = preset.vocabulary_size * d
    if preset.num_sampled is None:
        return {"embedding": tokens * d, "softmax": full}
    return {"embedding": tokens * d, "softmax": (tokens + preset.num_sampled) * d}


def _workspace(preset, weights):
    """Arrays that the updates of the largest weights make on the way."""
    kernels = weights["experts"] // (2 * max(1, preset.num_mixtures))
    if preset.middle == "moe" and preset.expert_optimizer == "factored_adam":
        kernels = min(kernels, _FACTORED_BLOCK)
    tables = [weights["embedding"] // _embeddings(preset), weights["softmax"]]
    largest = sorted([kernels, kernels, *tables])[-_UPDATES_AT_ONCE:]
    return round(_UPDATE_ARRAYS * sum(largest))


def _embeddings(preset):
    return 2 if preset.kind == "translation" else 1


def activation_numbers(preset: Preset, rows_over_mean: float = 1.0) -> dict[str, float]:
    """Numbers that a step keeps for each token of a device.

    Args:
        preset: A `Preset`; `recompute` leaves out the experts' hidden activations.
        rows_over_mean: Float. Rows of experts on the device over the mean.
            Defaults to `1`.

    Returns:
        Dict of part to float. The attention of a translation model, whose weights
        grow with the square of the sentences' lengths, is not in it.
    """
    preset = as_preset(preset)
    rows_over_mean = checks.verify_number(rows_over_mean, "rows_over_mean")
    d = preset.units
    cells = preset.lstm_units or d
    numbers = {"embedding": 2.0 * d}
    lstms = preset.lstm_layers + preset.encoder_lstms + preset.decoder_lstms
    lstm = _LSTM_CELLS * cells + _LSTM_WIDTHS * d
    numbers["lstm"] = lstms * (lstm + _RESIDUAL_WIDTHS * d)
    if preset.middle == "4xlstm":
        numbers["lstm"] += 2 * ((_LSTM_CELLS + _LSTM_WIDTHS) * d + _RESIDUAL_WIDTHS * d)
    mixtures = preset.num_mixtures
    if mixtures:
        rows = preset.experts_per_token * rows_over_mean
        hidden = 0 if preset.recompute else _HIDDEN * preset.hidden_units
        numbers["experts"] = mixtures * rows * (_ROW_WIDTHS * d + hidden)
        numbers["experts"] += mixtures * _RESIDUAL_WIDTHS * d
        logits = preset.num_experts
        if preset.num_groups is not None:
            logits = preset.num_groups + preset.k[0] * preset.group_size
        numbers["gating"] = mixtures * _GATE_LOGITS * logits
    elif preset.middle in ("moe_1_wide", "moe_1_deep"):
        layers = preset.k[0]
        numbers["experts"] = _HIDDEN * layers * preset.hidden_units
        numbers["experts"] += _RESIDUAL_WIDTHS * d
    if preset.num_sampled is None:
        numbers["softmax"] = _SCORES * preset.vocabulary_size
    else:
        numbers["softmax"] = _SAMPLED_SCORES * preset.num_sampled
    return numbers
