"""Ready models."""

from keras_moe.models.baselines import middle_layers
from keras_moe.models.language_model import MoELanguageModel
from keras_moe.models.sampling import sample_tokens

__all__ = ["MoELanguageModel", "middle_layers", "sample_tokens"]
