"""Keras models of the configurations of the paper."""

from typing import Any

import keras

from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.hierarchical_moe import HierarchicalMoE
from keras_moe.models.baselines import middle_layers
from keras_moe.models.language_model import MoELanguageModel
from keras_moe.models.presets import Preset


def build_language_model(preset: Preset, **options: Any) -> MoELanguageModel:
    """The language model that a preset describes.

    Nothing is allocated before it is built or called, so a preset of any size
    can be passed; `keras_moe.models.count` tells its parameters.

    Args:
        preset: A `Preset` of kind `"language_model"`.
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
    if preset.num_groups is None:
        layers = middle_layers(
            preset.middle,
            units=preset.units,
            hidden_units=preset.hidden_units,
            num_experts=max(1, preset.num_experts),
            k=preset.k[0],
            loss_weight=preset.loss_weight,
        )
        for layer in layers:
            if preset.recompute and hasattr(layer, "experts"):
                layer.experts.recompute = True
        return layers
    experts = FeedForwardExperts(
        preset.num_experts, preset.hidden_units, recompute=preset.recompute
    )
    return [
        HierarchicalMoE(
            experts,
            preset.num_groups,
            k=preset.k,
            importance_loss_weight=preset.loss_weight,
            load_loss_weight=preset.loss_weight,
            activation="sigmoid",
            name="moe",
        )
    ]
