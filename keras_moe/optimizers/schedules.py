"""Learning-rate schedules."""

import keras
import tensorflow as tf

from keras_moe import checks


@keras.saving.register_keras_serializable(package="keras_moe")
class WarmupInverseSquareRoot(
    checks.FromConfig, keras.optimizers.schedules.LearningRateSchedule
):
    """Linear rise, an optional plateau, then decay with the root of the step.

    With w = `warmup_steps` and p = w + `constant_steps`:
    $\\eta_t = \\eta \\cdot \\min(t / w, 1, \\sqrt{p / t})$, t counted from 1.

    Args:
        peak_learning_rate: Float. Highest rate.
        warmup_steps: Int. Steps of linear rise; the paper uses 1,000 for
            language models and 2,000 for translation.
        constant_steps: Int. Steps at the highest rate; the paper uses 8,000
            for translation. Defaults to `0`.

    Raises:
        ValueError: `warmup_steps` is not positive, or another argument is
            negative.

    Example:

    >>> schedule = keras_moe.optimizers.WarmupInverseSquareRoot(1.0, 4)
    >>> [round(float(schedule(step)), 2) for step in (0, 3, 15)]
    [0.25, 1.0, 0.5]

    Reference:
        Shazeer et al. 2017, appendices C.1 and E.
    """

    def __init__(self, peak_learning_rate, warmup_steps, constant_steps=0):
        super().__init__()
        self.peak_learning_rate = checks.verify_weight(
            peak_learning_rate, "peak_learning_rate"
        )
        self.warmup_steps = checks.verify_positive_int(warmup_steps, "warmup_steps")
        self.constant_steps = checks.verify_int(constant_steps, "constant_steps", 0)

    def __call__(self, step):
        step = tf.cast(step, tf.float32) + 1.0
        rise = step / self.warmup_steps
        fall = tf.sqrt((self.warmup_steps + self.constant_steps) / step)
        return self.peak_learning_rate * tf.minimum(tf.minimum(rise, 1.0), fall)

    def get_config(self):
        return {
            "peak_learning_rate": self.peak_learning_rate,
            "warmup_steps": self.warmup_steps,
            "constant_steps": self.constant_steps,
        }
