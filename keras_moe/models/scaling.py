"""The configurations of the paper at a size for a laptop."""

import dataclasses

from keras_moe import checks
from keras_moe.models.presets import Preset, as_preset


def scale_down(
    preset: Preset | str,
    *,
    factor: int = 16,
    max_experts: int = 64,
    vocabulary_size: int = 2_000,
    batch_tokens: int = 1_024,
) -> Preset:
    """The same shape at a size for a laptop.

    Widths are divided by `factor`, so that their ratios, and with them the
    shares of the parts in the operations, stay. Experts are reduced by a power
    of two, as are groups, as far as k allows; k, dropout, gates, the optimizer
    and the order of layers stay as they are. The schedule is shortened to a
    tenth.

    Args:
        preset: A `Preset`, or the name of one.
        factor: Int. Divides every width. Defaults to `16`.
        max_experts: Int. Most experts of one mixture. Defaults to `64`.
        vocabulary_size: Int. Words. Defaults to `2000`.
        batch_tokens: Int. Words of a batch. Defaults to `1024`.

    Returns:
        A `Preset` whose name ends in `_small`, for one device, without the
        paper's figures.

    Raises:
        ValueError: A size is not positive, `factor` divides no width, or
            `max_experts` is below k.
    """
    preset = as_preset(preset)
    factor = checks.verify_positive_int(factor, "factor")
    max_experts = checks.verify_positive_int(max_experts, "max_experts")
    if preset.units % factor:
        raise ValueError(
            "`factor` must divide the width of the model. Received: "
            f"factor={factor}, units={preset.units}. Use a power of two."
        )
    experts, groups = preset.num_experts, preset.num_groups
    while experts > max_experts:
        # The larger of the two levels shrinks first.
        if groups is not None and groups >= experts // groups:
            groups //= 2
        experts //= 2
    k_within = 1 if groups is None else preset.k[1]
    k_over = preset.k[0]
    fits = experts // (groups or 1) >= (k_over if groups is None else k_within)
    if preset.middle == "moe" and not (fits and (groups is None or groups >= k_over)):
        raise ValueError(
            "`max_experts` must leave k experts to choose from. Received: "
            f"max_experts={max_experts}, k={preset.k}. Raise it."
        )
    return dataclasses.replace(
        preset,
        name=f"{preset.name}_small",
        vocabulary_size=checks.verify_positive_int(vocabulary_size, "vocabulary_size"),
        units=preset.units // factor,
        lstm_units=preset.lstm_units and max(1, preset.lstm_units // factor),
        hidden_units=max(1, preset.hidden_units // factor),
        num_experts=experts,
        num_groups=groups,
        batch_tokens=checks.verify_positive_int(batch_tokens, "batch_tokens"),
        training_steps=None,
        warmup_steps=max(1, preset.warmup_steps // 10),
        constant_steps=preset.constant_steps // 10,
        num_sampled=preset.num_sampled and max(1, vocabulary_size // 10),
        num_devices=1,
        reported={},
    )
