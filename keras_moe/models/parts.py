"""What the language model and the translation model are both made of."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from keras_moe import checks
from keras_moe.layers.projected_lstm import ProjectedLSTMCell


def make_cell(units: int, lstm_units: int | None, dtype: Any) -> keras.layers.Layer:
    """An LSTM cell of `lstm_units` projected to `units`; None: not projected."""
    if lstm_units is None:
        return keras.layers.LSTMCell(units, dtype=dtype)
    return ProjectedLSTMCell(lstm_units, projection_units=units, dtype=dtype)


def make_lstm(
    units: int, lstm_units: int | None, name: str, dtype: Any
) -> keras.layers.RNN:
    """A layer of the cell of `make_cell`; returns sequences and its state."""
    options = {
        "return_sequences": True,
        "return_state": True,
        "name": name,
        "dtype": dtype,
    }
    if lstm_units is None:
        return keras.layers.LSTM(units, **options)
    return keras.layers.RNN(make_cell(units, lstm_units, dtype), **options)


def zero_states(layers: Iterable, batch_size: Any, dtype: str) -> list:
    """Zero states of layers with a recurrent `cell`.

    Args:
        layers: The layers.
        batch_size: Int or scalar int tensor.
        dtype: Float type.

    Returns:
        For each layer the list of its states, `(batch_size, state units)`.
    """
    sizes = [layer.cell.state_size for layer in layers]
    return [
        [
            tf.zeros((batch_size, size), dtype)
            for size in (of_layer if isinstance(of_layer, Sequence) else [of_layer])
        ]
        for of_layer in sizes
    ]


def verify_states(layers: Iterable, state: Any, rows: int | None) -> None:
    """Raises unless there is a row of states for each of `rows`."""
    sizes = tf.nest.flatten([layer.cell.state_size for layer in layers])
    for size, each in zip(sizes, tf.nest.flatten(state), strict=True):
        checks.verify_shape([rows, size], "a row for each of the tokens", state=each)


def as_layers(middle: Any, name: str) -> list[keras.layers.Layer]:
    """A list of layers, of which None makes none.

    Raises:
        ValueError: The argument called `name` holds something else.
    """
    if middle is None:
        return []
    layers = list(middle) if isinstance(middle, Sequence) else [middle]
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                f"`{name}` must be a layer or a list of layers. Received: {layer!r} "
                f"in {name}={middle!r}. Pass keras_moe.layers.MoE(...), for example."
            )
    return layers


def verify_width(layer: keras.layers.Layer, units: int) -> None:
    """Raises a `ValueError` unless a layer between the LSTMs keeps the width."""
    width = layer.compute_output_shape((None, None, units))[-1]
    if width != units:
        raise ValueError(
            f"Layer {layer.name!r} between the LSTMs must give `units` features, for "
            f"the residual. Received: {width} features, units={units}. Leave out "
            "`output_units` of its experts."
        )


_Model: Any = keras.Model if TYPE_CHECKING else object


class SavedWhole(_Model):
    """A model of a class of its own, which HDF5 files cannot bring back."""

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                f"`filepath` of a {type(self).__name__} must end in `.keras`: what "
                f"HDF5 holds of it cannot be loaded. Received: filepath={filepath}. "
                "Save a `.keras` file, or the weights alone with "
                "`save_weights('... .weights.h5')`."
            )
        super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)


class TracedFunctions:
    """Functions traced once for each key, out of sight of Keras' tracking."""

    def __init__(self):
        self._by_key: dict = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The function of a key, made when it is first asked for."""
        if key not in self._by_key:
            self._by_key[key] = make()
        return self._by_key[key]
