"""Learning rate, optimizer, loss and metrics of a training."""

import re

import keras

from keras_moe import losses, telemetry
from keras_moe.optimizers import FactoredAdam, WarmupInverseSquareRoot

# Where the weights of experts and those of gates stand, whatever their number.
_PARTS = {
    "expert_learning_rate": r"_experts(_\d+)?/",
    "gate_learning_rate": r"_gating(_\d+)?/",
}


def learning_rate(
    options, steps: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """The schedule of the options, for a training of so many steps."""
    peak, warmup = options.learning_rate, options.warmup_steps
    if options.decay == "cosine":
        return keras.optimizers.schedules.CosineDecay(
            0.0, max(1, steps - warmup), warmup_target=peak, warmup_steps=warmup
        )
    constant = getattr(options, "constant_steps", 0)
    return WarmupInverseSquareRoot(peak, warmup, constant)


def make_optimizer(options, model, schedule, **arguments):
    """Adam as the options want it.

    Args:
        options: Those of the command.
        model: The model, built; a factor of what it has not is left out.
        schedule: From `learning_rate`.
        **arguments: Those of `FactoredAdam` beside its factors of the learning rate.
            Without any it is Keras' Adam, in one pass over the weights.
    """
    factors = {
        pattern: getattr(options, name)
        for name, pattern in _PARTS.items()
        if getattr(options, name) != 1.0
        and any(re.search(pattern, w.path) for w in model.trainable_variables)
    }
    arguments = {"factored": [], "learning_rate_factors": factors, **arguments}
    return FactoredAdam(schedule, **arguments)


def compile_model(model, optimizer):
    """Compiles a model of token logits, ready for checkpoints."""
    model.compile(
        optimizer,
        losses.TokenCrossentropy(),
        weighted_metrics=[telemetry.Perplexity()],
    )
    # Now and not in the first step, so that a file saved before it is complete.
    model.optimizer.build(model.trainable_variables)
