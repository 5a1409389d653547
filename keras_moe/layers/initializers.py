"""Initial values of stacked weights: one expert at a time."""

import keras
import tensorflow as tf

from keras_moe import checks
from keras_moe.types import at_least_float32

# Initializers whose values do not depend on the shape: one draw of the whole
# stack is the same as one draw for each expert.
_SHAPE_FREE = (
    keras.initializers.Zeros,
    keras.initializers.Ones,
    keras.initializers.Constant,
    keras.initializers.RandomNormal,
    keras.initializers.RandomUniform,
    keras.initializers.TruncatedNormal,
)


class PerExpertInitializer(keras.initializers.Initializer):
    """Gives every slice of a stack what `initializer` gives a single matrix.

    Keras counts all but the last two axes of a weight as a receptive field, so
    a stack `(E, in, out)` given to Glorot or He would come out smaller by
    about the square root of E. A seeded initializer called once for each
    expert would make all experts alike. Here fans are those of one expert and
    the experts differ.

    Args:
        initializer: A Keras initializer, its name, or a function of shape and
            dtype.
    """

    def __init__(self, initializer):
        self.initializer = keras.initializers.get(initializer)

    def __call__(self, shape, dtype=None):
        init = self.initializer
        if isinstance(init, _SHAPE_FREE):
            return init(shape, dtype=dtype)
        if len(shape) < 3:
            return in_single_precision(init, shape, dtype)
        if isinstance(init, keras.initializers.VarianceScaling):
            return self._variance_scaling(init, tuple(shape), dtype)
        slices = [
            in_single_precision(_reseeded(init, i), tuple(shape[1:]), dtype)
            for i in range(shape[0])
        ]
        return tf.stack([tf.convert_to_tensor(part) for part in slices])

    @staticmethod
    def _variance_scaling(init, shape, dtype):
        """All experts in one draw, with the fans of a single expert."""
        fan_in, fan_out = shape[-2], shape[-1]
        fan = {"fan_in": fan_in, "fan_out": fan_out}.get(
            init.mode, (fan_in + fan_out) / 2
        )
        variance = init.scale / max(1.0, fan)
        if init.distribution == "uniform":
            limit = (3.0 * variance) ** 0.5
            return keras.random.uniform(shape, -limit, limit, dtype, seed=init.seed)
        if init.distribution == "untruncated_normal":
            return keras.random.normal(shape, 0.0, variance**0.5, dtype, seed=init.seed)
        # A normal cut off at two standard deviations has 0.8796 of its width.
        stddev = variance**0.5 / 0.87962566103423978
        return keras.random.truncated_normal(shape, 0.0, stddev, dtype, seed=init.seed)

    def get_config(self):
        return {"initializer": keras.initializers.serialize(self.initializer)}

    @classmethod
    def from_config(cls, config):
        checks.verify_config(cls, config)
        return cls(keras.initializers.deserialize(config["initializer"]))


def in_single_precision(init, shape, dtype):
    """Values of `init` drawn in float32 at least: QR, for one, has no bfloat16."""
    dtype = tf.as_dtype(dtype or keras.config.floatx())
    return tf.cast(init(shape, dtype=at_least_float32(dtype).name), dtype)


def _reseeded(init, index):
    """A copy of a seeded initializer for the expert of this index."""
    seed = getattr(init, "seed", None)
    if not isinstance(seed, int):
        return init
    return type(init).from_config({**init.get_config(), "seed": seed + index})
