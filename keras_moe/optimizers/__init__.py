"""Optimizers and learning-rate schedules."""

from keras_moe.optimizers.schedules import WarmupInverseSquareRoot

__all__ = ["WarmupInverseSquareRoot"]
