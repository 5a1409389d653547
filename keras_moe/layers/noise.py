"""Noise that does not depend on the number of devices."""

import keras

from keras_moe import functional, placement


def draw_rows(num_rows, width, dtype, seed_generator, mask=None):
    """Standard normal rows, one for each token of this device.

    On several devices they are those that one device would draw for the same
    tokens of the global batch, whichever device they are on.

    Args:
        num_rows: Int or `()` int32.
        width: Int. Features of a row.
        dtype: Float type.
        seed_generator: `keras.random.SeedGenerator`, in the same state everywhere.
        mask: `(num_rows,)` bool or None. On a mesh, where tokens marked False are
            still among the rows, the others get the rows they would have by
            themselves. Defaults to `None`.

    Returns:
        `(num_rows, width)`.
    """
    place = placement.for_call()
    if place.num_replicas == 1:
        noise = keras.random.normal((num_rows, width), dtype=dtype, seed=seed_generator)
        return place.noise_of(noise, mask)
    return functional.normal_rows(
        seed_generator.next(), place.num_before(num_rows), num_rows, width, dtype
    )
