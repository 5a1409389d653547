"""Keras models of the configurations of the paper."""

from typing import Any

import keras

from keras_moe.models.language_model import MoELanguageModel
from keras_moe.models.middle import make_mixture, middle_layers
from keras_moe.models.presets import Preset, as_preset
from keras_moe.models.translation import MoETranslator
from keras_moe.models.translation_layers import translation_middle


def build_language_model(preset: Preset | str, **options: Any) -> MoELanguageModel:
    """The language model that a preset describes.

    Nothing is allocated before it is built or called, so a preset of any size
    can be passed; `keras_moe.models.count` tells its parameters.

    Args:
        preset: A `Preset` of kind `"language_model"`, or its name.
        **options: More arguments of `MoELanguageModel`, e.g. `stateful=True`.

    Returns:
        A `MoELanguageModel`, not compiled.

    Raises:
        ValueError: The preset is of a translation model.

    Example:

    >>> small = keras_moe.models.scale_down(keras_moe.models.preset("moe_4096_h"))
    >>> keras_moe.models.build_language_model(small).moe_layers[0].num_experts
    64
    """
    preset = as_preset(preset)
    if preset.kind != "language_model":
        raise ValueError(
            "`preset` must be of a language model. Received: "
            f"name={preset.name!r}, kind={preset.kind!r}. Use a preset whose name "
            "does not begin with 'mt_'."
        )
    return MoELanguageModel(
        preset.vocabulary_size,
        preset.units,
        **{
            "middle": make_middle(preset),
            "lstm_units": preset.lstm_units,
            "lstm_layers": preset.lstm_layers,
            "dropout": preset.dropout,
            "num_sampled": preset.num_sampled,
            **options,
        },
    )


def make_middle(preset: Preset) -> list[keras.layers.Layer]:
    """New layers between the LSTMs of a language model preset."""
    if preset.middle == "moe":
        return [
            make_mixture(
                preset.hidden_units,
                preset.num_experts,
                preset.k,
                num_groups=preset.num_groups,
                gating=preset.gating,
                noise=preset.noise,
                loss_weight=preset.loss_weight,
                recompute=preset.recompute,
                shared_units=preset.shared_units,
                units=preset.units,
            )
        ]
    layers = middle_layers(
        preset.middle,
        units=preset.units,
        hidden_units=preset.hidden_units,
        k=preset.k[0],
        shared_units=preset.shared_units,
    )
    for layer in layers:
        if preset.recompute and hasattr(layer, "experts"):
            layer.experts.recompute = True
    return layers


def build_translation_model(preset: Preset | str, **options: Any) -> MoETranslator:
    """The translation model that a preset describes.

    Nothing is allocated before it is built or called. In a hierarchical mixture
    with the strictly balanced gate, that gate chooses the groups and noisy top-k
    gates the experts within; the paper does not say how the two go together.

    Args:
        preset: A `Preset` of kind `"translation"`, or its name.
        **options: More arguments of `MoETranslator`, e.g. `vocabulary=...`.

    Returns:
        A `MoETranslator`, not compiled.

    Raises:
        ValueError: The preset is of a language model.

    Example:

    >>> small = keras_moe.models.scale_down(keras_moe.models.preset("mt_moe_2048_h"))
    >>> [m.num_experts for m in keras_moe.models.build_translation_model(small).moe_layers]
    [64, 64]
    """
    preset = as_preset(preset)
    if preset.kind != "translation":
        raise ValueError(
            "`preset` must be of a translation model. Received: "
            f"name={preset.name!r}, kind={preset.kind!r}. Use a preset whose name "
            "begins with 'mt_'."
        )
    sides = {
        f"{side}_middle": translation_middle(
            preset.middle,
            units=preset.units,
            hidden_units=preset.hidden_units,
            num_experts=max(1, preset.num_experts),
            k=preset.k,
            num_groups=preset.num_groups,
            gating=preset.gating,
            noise=preset.noise,
            loss_weight=preset.loss_weight,
            shared_units=preset.shared_units,
            name=f"{side}_moe",
        )
        for side in ("encoder", "decoder")
    }
    return MoETranslator(
        preset.vocabulary_size,
        preset.units,
        **{
            **sides,
            "lstm_units": preset.lstm_units,
            "encoder_lstms": preset.encoder_lstms,
            "decoder_lstms": preset.decoder_lstms,
            "middle_after": preset.moe_after,
            "dropout": preset.dropout,
            **options,
        },
    )
