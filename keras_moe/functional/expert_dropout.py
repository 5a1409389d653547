"""Dropout of hidden units of experts, the same wherever a row is computed.

A token carries a random key of 32 bits, and every hidden unit of every expert has a
random function of keys in a step. The unit drops the token if the function of its key
is below the rate. So a mask is no tensor that must follow its row: it is made again
from the row where it is needed, in the backward pass, in a slot of a static number, or
on the device that the row has been sent to.

The functions are $h(x) = a x + b$ modulo $2^{32}$ with a random odd a and a random b.
Units are independent of each other, and so are the experts of a token; of the tokens of
a unit any two are, nearly (Dietzfelbinger 1996, "Universal hashing and k-wise
independent random variables via integer arithmetic without primes").
"""

import contextlib
from contextvars import ContextVar

import tensorflow as tf

# Columns of a key behind the features of a row, and parts of a unit's function. Each is
# a whole number that the type holds exactly, bfloat16 up to 256.
KEY_COLUMNS = 4
FUNCTION_PARTS = 4


def keys_of(uniform: tf.Tensor) -> tf.Tensor:
    """`(N, 4)` within [0, 1) -> `(N, 4)`, keys as digits to the base 256."""
    return tf.floor(uniform * 256.0)


def functions_of(uniform: tf.Tensor) -> tf.Tensor:
    """`(E, 4, U)` float32 within [0, 1) -> `(E, 4, U)`: a and b, 16 bits a number."""
    return tf.floor(uniform * 65536.0)


def kept(keys: tf.Tensor, functions: tf.Tensor, rate: float) -> tf.Tensor:
    """Which hidden units a row keeps.

    Args:
        keys: `(..., R, 4)` from `keys_of`.
        functions: `(..., 4, U)` from `functions_of`.
        rate: Share of units that are dropped, within [0, 1).

    Returns:
        `(..., R, U)` bool.
    """
    key = _joined(tf.unstack(keys, axis=-1), 256)[..., tf.newaxis]
    parts = tf.unstack(functions, num=FUNCTION_PARTS, axis=-2)
    a = _joined(parts[:2], 65536) * tf.constant(2, tf.uint32) + tf.constant(
        1, tf.uint32
    )
    b = _joined(parts[2:], 65536)
    hashed = key * a[..., tf.newaxis, :] + b[..., tf.newaxis, :]
    return hashed >= tf.constant(round(rate * 2**32), tf.uint32)


def _joined(digits, base):
    total = tf.cast(digits[0], tf.uint32)
    for digit in digits[1:]:
        total = total * tf.constant(base, tf.uint32) + tf.cast(digit, tf.uint32)
    return total


class _Dropping:
    """The keys and functions of a call of a network, and the units it has had."""

    def __init__(self, keys, functions, rate):
        self._keys, self._functions, self._rate = keys, functions, rate
        self._seen = 0

    def __call__(self, hidden):
        units = hidden.shape[-1]
        own = self._functions[..., self._seen : self._seen + units]
        self._seen += units
        mask = kept(self._keys, own, self._rate)
        scaled = hidden * (1.0 / (1.0 - self._rate))
        return tf.where(mask, scaled, tf.zeros_like(scaled))


# Of the network that is called here; replicas are threads, each with its own.
_dropping: ContextVar[_Dropping | None] = ContextVar("dropping", default=None)


@contextlib.contextmanager
def dropping(keys: tf.Tensor, functions: tf.Tensor, rate: float):
    """A context within which `drop` drops.

    Args:
        keys: Of the rows of the network, `(..., R, 4)`.
        functions: Of its hidden units, `(..., 4, U)`.
        rate: Share of units that are dropped.
    """
    token = _dropping.set(_Dropping(keys, functions, rate))
    try:
        yield
    finally:
        _dropping.reset(token)


def drop(hidden: tf.Tensor) -> tf.Tensor:
    """`(..., R, units)` with the dropped units zero and the others scaled up.

    Unchanged outside of `dropping`. Calls of one network take its units in their order.
    """
    here = _dropping.get()
    return hidden if here is None else here(hidden)
