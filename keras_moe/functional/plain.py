"""The choice of operations that every runtime has, at some cost in speed."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_chosen: ContextVar[bool] = ContextVar("plain_operations", default=False)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Traces mixtures inside the `with` block by operations that convert.

    The same results by the operations that TensorFlow Lite has built in. Outside of it
    mixtures use faster ones of TensorFlow's own. What was traced before stays as it is.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(4, hidden_units=8)
    >>> layer = keras_moe.layers.MoE(experts, keras_moe.layers.TopKGating(k=2))
    >>> x = np.ones((3, 8), "float32")
    >>> with keras_moe.serving.plain_operations():
    ...     outputs = layer(x)
    >>> bool(np.allclose(outputs, layer(x), atol=1e-6))
    True
    """
    token = _chosen.set(True)
    try:
        yield
    finally:
        _chosen.reset(token)


def only_plain() -> bool:
    """Whether the code runs within `plain_operations`."""
    return _chosen.get()
