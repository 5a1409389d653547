"""Operations and parameters of a preset, by arithmetic."""

import dataclasses

from keras_moe.models.middle import gate_columns, num_deep_layers
from keras_moe.models.presets import Preset, as_preset

# Not in the paper's operations and parameters of its language models.
OUTSIDE = ("embedding", "softmax")


@dataclasses.dataclass(frozen=True)
class Count:
    """What a model costs, part by part.

    Attributes:
        operations: Dict of part to multiply-adds of one token, forward.
        parameters: Dict of part to number of parameters.
    """

    operations: dict[str, int]
    parameters: dict[str, int]

    @property
    def core_operations(self) -> int:
        """Operations without embedding and softmax: "ops/timestep" of table 7."""
        return sum(n for part, n in self.operations.items() if part not in OUTSIDE)

    @property
    def core_parameters(self) -> int:
        """Parameters without embedding and softmax, as in table 7."""
        return sum(n for part, n in self.parameters.items() if part not in OUTSIDE)

    @property
    def total_operations(self) -> int:
        """All operations of one token, the full softmax included."""
        return sum(self.operations.values())

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())


def count(preset: Preset | str, *, biases: bool = False) -> Count:
    """Operations of a token and parameters of a preset, split by part.

    An operation is one multiply-add of the forward pass. A token meets k experts
    and, in a hierarchical mixture, the primary gate and the secondary gates of
    its groups; the gate's and the noise's matrices both count. The embedding is a
    look-up and costs nothing. Of a translation model a token is a pair of one
    source and one target word.

    Args:
        preset: A `Preset`, or the name of one.
        biases: Bool. Whether parameters include the biases of LSTMs and softmax,
            which the models of this package have and the paper's counts leave
            out. Defaults to `False`.

    Returns:
        A `Count` with the parts `embedding`, `lstm`, `gating`, `experts`,
        `softmax` and, for translation, `attention`.

    Raises:
        ValueError: There is no preset of that name.

    Example:

    >>> count = keras_moe.models.count(keras_moe.models.preset("moe_256_h"))
    >>> count.core_operations, count.core_parameters
    (8437760, 272908288)

    Reference:
        Shazeer et al. 2017, tables 7 and 8, appendices C.1 and E.
    """
    preset = as_preset(preset)
    if preset.kind == "language_model":
        return _language_model(preset, biases)
    return _translation(preset, biases)


def _language_model(preset, biases):
    d, v = preset.units, preset.vocabulary_size
    lstm, lstm_parameters = _lstm(d, preset.lstm_units, d, biases)
    num_lstms = preset.lstm_layers
    middle_lstm = _lstm(d, None, d, biases) if preset.middle == "4xlstm" else (0, 0)
    gating, gating_parameters = _gating(preset)
    experts, expert_parameters = _experts(preset)
    return Count(
        {
            "embedding": 0,
            "lstm": num_lstms * lstm + 2 * middle_lstm[0],
            "gating": gating,
            "experts": experts,
            "softmax": v * d,
        },
        {
            "embedding": v * d,
            "lstm": num_lstms * lstm_parameters + 2 * middle_lstm[1],
            "gating": gating_parameters,
            "experts": expert_parameters,
            "softmax": v * d + (v if biases else 0),
        },
    )


def _translation(preset, biases):
    d, v = preset.units, preset.vocabulary_size
    lstm, lstm_parameters = _lstm(d, preset.lstm_units, d, biases)
    # The first LSTM of the decoder takes the context of the attention too.
    first, first_parameters = _lstm(2 * d, preset.lstm_units, d, biases)
    others = preset.encoder_lstms + preset.decoder_lstms - 1
    gating, gating_parameters = _gating(preset)
    experts, expert_parameters = _experts(preset)
    n = len(preset.moe_after)  # with a mixture or a dense expert
    return Count(
        {
            "embedding": 0,
            "lstm": others * lstm + first,
            "gating": n * gating,
            "experts": n * experts,
            # The products over all pairs of positions depend on the sentences'
            # lengths and are not in the paper's count.
            "attention": 0,
            "softmax": v * d,
        },
        {
            "embedding": 2 * v * d,
            "lstm": others * lstm_parameters + first_parameters,
            "gating": n * gating_parameters,
            "experts": n * expert_parameters,
            "attention": 2 * d * d + d,
            "softmax": v * d + (v if biases else 0),
        },
    )


def _lstm(inputs, lstm_units, outputs, biases):
    """Operations and parameters; `lstm_units` None means no projection."""
    cells = lstm_units or outputs
    operations = 4 * (inputs + outputs) * cells
    if lstm_units is not None:
        operations += cells * outputs
    return operations, operations + (4 * cells if biases else 0)


def _gating(preset):
    if preset.middle != "moe":
        return 0, 0
    d, m, a = preset.units, preset.gate_matrices, preset.num_groups
    operations = d * gate_columns(preset.num_experts, preset.k, a, m, m)
    # Every secondary gate is there, whether a token meets it or not.
    return operations, m * d * (preset.num_experts + (a or 0))


def _experts(preset):
    d, h = preset.units, preset.hidden_units
    one = 2 * d * h
    shared = 2 * d * preset.shared_units
    if preset.middle == "moe":
        chosen = preset.experts_per_token * one
        return chosen + shared, preset.num_experts * one + shared
    if preset.middle == "moe_1_wide":
        return preset.k[0] * one + shared, preset.k[0] * one + shared
    if preset.middle == "moe_1_deep":
        k = preset.k[0] + preset.shared_units / h
        size = one + (num_deep_layers(d, h, k) - 1) * h * h
        return size, size
    return 0, 0
