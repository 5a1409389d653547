"""Noise that does not depend on the number of devices."""

import keras

from keras_moe import engine, functional

_DRAWS = {
    "normal": (keras.random.normal, functional.normal_rows),
    "uniform": (keras.random.uniform, functional.uniform_rows),
}


def draw_rows(
    num_rows,
    width,
    dtype,
    seed_generator,
    first_row=None,
    mask=None,
    distribution="normal",
):
    """Random rows, one for each token of this device.

    On several devices they are those that one device would draw for the same
    tokens of the global batch, whichever device they are on.

    Args:
        num_rows: Int or `()` int32.
        width: Int. Features of a row.
        dtype: Float type.
        seed_generator: `keras.random.SeedGenerator`, in the same state everywhere.
        first_row: `()` int32. Rows before these, over all devices. None means
            the tokens of the devices before this one. Defaults to `None`.
        mask: `(num_rows,)` bool or None. Where tokens marked False are still among
            the rows (on a mesh, with a capacity), the others get the rows they would
            have by themselves. Defaults to `None`.
        distribution: `"normal"`, standard, or `"uniform"`, within [0, 1). Defaults to
            `"normal"`.

    Returns:
        `(num_rows, width)`.
    """
    here = engine.current()
    draw, draw_part = _DRAWS[distribution]
    if here.replicas.number == 1:
        noise = draw((num_rows, width), dtype=dtype, seed=seed_generator)
        return here.operations.noise_of(noise, mask)
    if first_row is None:
        first_row = here.replicas.num_before(num_rows)
    return draw_part(seed_generator.next(), first_row, num_rows, width, dtype)
