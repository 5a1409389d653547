"""Noise of gates: how much of it, and random rows whatever the number of devices."""

from typing import Any

import keras
import tensorflow as tf

from keras_moe import checks, engine, functional
from keras_moe.functional.gating import choose_noisy
from keras_moe.layers.step_clock import StepClock, only_looks

LEARNED = "learned"
_Schedule = keras.optimizers.schedules.LearningRateSchedule
_ROWS = {"normal": functional.normal_rows, "uniform": functional.uniform_rows}


class NoiseLevel:
    """The standard deviation of a gate's noise: learned, fixed or scheduled.

    Args:
        stddev: `"learned"`, a float or a `LearningRateSchedule`, or the config of one.
        epsilon: Float. Added to a learned deviation; for another the least one that
            the smooth load reckons with.

    Attributes:
        stddev: The first of them, checked.
        epsilon: The second.

    Raises:
        ValueError: One of them is negative or of another kind.
    """

    def __init__(self, stddev: Any, epsilon: float):
        if isinstance(stddev, dict):
            stddev = keras.optimizers.schedules.deserialize(stddev)
        if not isinstance(stddev, _Schedule) and stddev != LEARNED:
            rest = f". It may be {LEARNED!r} or a LearningRateSchedule too; 0 is none."
            stddev = checks.verify_number(stddev, "noise_stddev", rest=rest)
        self.stddev = stddev
        self.epsilon = checks.verify_weight(epsilon, "noise_epsilon")
        self._clock: StepClock | None = None

    @property
    def is_learned(self) -> bool:
        """Whether the gate needs a kernel for it."""
        return self.stddev == LEARNED

    @property
    def is_none(self) -> bool:
        """Whether there is never any noise."""
        return self.stddev == 0.0

    def build(self, layer: keras.layers.Layer, weight: Any) -> None:
        """Makes the state of a schedule.

        Args:
            layer: The gate, in its `build`.
            weight: A weight that every optimizer step changes, whole on every device;
                None if there is none.

        Raises:
            ValueError: There is a schedule and no weight.
        """
        if not isinstance(self.stddev, _Schedule):
            return
        if weight is None:
            raise ValueError(
                f"`noise_stddev` of {layer.name} can be a schedule only with a "
                "`primary_gating` that has a `gate_kernel`, by which steps are counted. "
                f"Received: noise_stddev={self.stddev!r}. Pass a float, or another gate."
            )
        self._clock = StepClock(layer, weight)

    def tick(self, inputs: Any) -> None:
        """Looks whether a step has ended; once in a training call.

        Args:
            inputs: What depends on the batch.
        """
        if self._clock is not None and not only_looks():
            self._clock.tick(tf.convert_to_tensor(inputs))

    def of(self, clean_logits: tf.Tensor, raw_noise: tf.Tensor | None) -> tf.Tensor:
        """The deviation of the noise on every logit.

        Args:
            clean_logits: `(N, E)`.
            raw_noise: `(N, E)` where it is learned, else None.

        Returns:
            `(N, E)`.
        """
        if raw_noise is not None:
            return functional.noise_stddev(raw_noise, self.epsilon)
        stddev = self.stddev
        if self._clock is not None:
            stddev = tf.maximum(self.stddev(self._clock.num_steps), 0.0)
        return tf.zeros_like(clean_logits) + tf.cast(stddev, clean_logits.dtype)

    def top_k_gating(
        self,
        clean_logits: tf.Tensor,
        raw_noise: tf.Tensor | None,
        noise: tf.Tensor,
        k: int,
        normalization: str,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """`functional.noisy_top_k_gating` with this deviation.

        Args:
            clean_logits: `(N, E)`.
            raw_noise: `(N, E)` where it is learned, else None.
            noise: `(N, E)`, standard normal.
            k: Experts for each token.
            normalization: That of the gates.

        Returns:
            Gates and experts, `(N, K)`; the probabilities of the load, `(N, E)`.
        """
        stddev = self.of(clean_logits, raw_noise)
        noisy = functional.noisy_logits(clean_logits, stddev, noise)
        # The gradient of the load grows as the noise shrinks; learned noise has its
        # least deviation already.
        least = tf.maximum(stddev, self.epsilon) if raw_noise is None else stddev
        return choose_noisy(clean_logits, noisy, least, k, normalization)

    def get_config(self) -> Any:
        """What the constructor takes, for a config."""
        if isinstance(self.stddev, _Schedule):
            return keras.optimizers.schedules.serialize(self.stddev)
        return self.stddev


def draw_rows(
    num_rows,
    width,
    dtype,
    seed_generator,
    first_row=None,
    mask=None,
    kind="normal",
    counts=None,
):
    """Random rows, one for each token of this device.

    On several devices they are those that one device would draw for the same
    tokens of the global batch, whichever device they are on.

    Args:
        num_rows: Int or `()` int32.
        width: Int. Features of a row.
        dtype: Float type.
        seed_generator: `keras.random.SeedGenerator`, in the same state everywhere.
        first_row: `()` int32. Rows before these, over all devices; or `(S,)`, of
            S runs of rows that lie here one after the other. None means the tokens of
            the devices before this one. Defaults to `None`.
        mask: `(num_rows,)` bool or None. Where tokens marked False are still among
            the rows (shapes are static there), the others get the rows they would
            have by themselves. Defaults to `None`.
        kind: `"normal"`, standard, or `"uniform"`, within [0, 1). Defaults to
            `"normal"`.
        counts: `(S,)` int32, rows of each run. Defaults to `None`, one run.

    Returns:
        `(num_rows, width)`.
    """
    here = engine.current()
    if here.replicas.number == 1:
        draw = getattr(keras.random, kind)
        noise = draw((num_rows, width), dtype=dtype, seed=seed_generator)
        return here.operations.noise_of(noise, mask)
    if first_row is None:
        first_row = here.replicas.num_before(num_rows)
    draw, seed = _ROWS[kind], seed_generator.next()
    if tf.convert_to_tensor(first_row).shape.rank == 0:
        return draw(seed, first_row, num_rows, width, dtype)
    runs = zip(tf.unstack(first_row), tf.unstack(counts), strict=True)
    drawn = [draw(seed, first, count, width, dtype) for first, count in runs]
    return tf.concat([tf.zeros((0, width), dtype), *drawn], axis=0)
