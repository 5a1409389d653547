"""Ready models."""

from keras_moe.models.beams import beam_search
from keras_moe.models.counting import Count, count
from keras_moe.models.language_model import MoELanguageModel
from keras_moe.models.middle import make_mixture, middle_layers
from keras_moe.models.preset_models import (
    build_language_model,
    build_translation_model,
)
from keras_moe.models.presets import Preset, preset, preset_names
from keras_moe.models.sampling import sample_tokens
from keras_moe.models.scaling import scale_down
from keras_moe.models.transformer import MoETransformerLanguageModel
from keras_moe.models.translation import MoETranslator
from keras_moe.models.translation_layers import translation_middle

__all__ = [
    "Count",
    "MoELanguageModel",
    "MoETransformerLanguageModel",
    "MoETranslator",
    "Preset",
    "beam_search",
    "build_language_model",
    "build_translation_model",
    "count",
    "make_mixture",
    "middle_layers",
    "preset",
    "preset_names",
    "sample_tokens",
    "scale_down",
    "translation_middle",
]
