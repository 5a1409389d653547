"""Optimizers and learning-rate schedules."""

from keras_moe.optimizers.factored_adam import FactoredAdam
from keras_moe.optimizers.schedules import WarmupInverseSquareRoot

__all__ = ["FactoredAdam", "WarmupInverseSquareRoot"]
