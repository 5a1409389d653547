"""What a graph is traced for: this machine, a GPU, or a runtime with few operations."""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

# "plain", "GPU", or None for this machine.
_chosen: ContextVar[str | None] = ContextVar("runtime", default=None)
_compiled: ContextVar[bool] = ContextVar("compiled_mixtures", default=False)


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
    with _traced_for("plain"):
        yield


@contextlib.contextmanager
def gpu_operations() -> Iterator[None]:
    """Traces mixtures inside the `with` block for a GPU, whatever this machine has.

    The same results by operations whose shapes do not depend on the data and which have
    kernels for GPUs: for a model that is exported on one machine and served on another.
    Where TensorFlow sees a GPU, and where XLA compiles, mixtures are traced like this
    anyway. What was traced before stays as it is.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(4, hidden_units=8)
    >>> layer = keras_moe.layers.MoE(experts, keras_moe.layers.TopKGating(k=2))
    >>> x = np.ones((3, 8), "float32")
    >>> with keras_moe.serving.gpu_operations():
    ...     outputs = layer(x)
    >>> bool(np.allclose(outputs, layer(x), atol=1e-6))
    True
    """
    with _traced_for("GPU"):
        yield


@contextlib.contextmanager
def compiled_mixtures() -> Iterator[None]:
    """Traces mixtures inside the `with` block so that XLA compiles their experts.

    For a model that Keras leaves uncompiled on a GPU, one with a cuDNN `LSTM` say: moving
    tokens, experts and combination become one program, forward and backward. It makes
    no difference on a processor, and where XLA compiles the whole anyway.

    XLA compiles again, for seconds, for every new number of tokens: pad sequences to few
    lengths. Not for a model that is exported by Keras or TensorFlow, since TensorFlow
    Serving does without XLA; `serving.export` takes no notice of it. Experts with
    `frozen_experts`, and layers that are not `Experts`, are not compiled. A `network`
    of your own must not add losses.

    Example:

    >>> experts = keras_moe.layers.FeedForwardExperts(4, hidden_units=8)
    >>> layer = keras_moe.layers.MoE(experts, keras_moe.layers.TopKGating(k=2))
    >>> model = keras.Sequential([layer])
    >>> model.compile("adam", "mse", jit_compile=False)
    >>> x = np.ones((3, 8), "float32")
    >>> with keras_moe.serving.compiled_mixtures():
    ...     outputs = model.predict(x, verbose=0)
    >>> bool(np.allclose(outputs, layer(x), atol=1e-6))
    True
    """
    with _set(_compiled, True):
        yield


@contextlib.contextmanager
def uncompiled_mixtures() -> Iterator[None]:
    """Takes back `compiled_mixtures`."""
    with _set(_compiled, False):
        yield


def compiles_mixtures() -> bool:
    """Whether the code runs within `compiled_mixtures`."""
    return _compiled.get()


def _traced_for(kind):
    return _set(_chosen, kind)


@contextlib.contextmanager
def _set(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def only_plain() -> bool:
    """Whether the code runs within `plain_operations`."""
    return _chosen.get() == "plain"


def device_type() -> str:
    """The kind of device that what is traced here will run on, `"CPU"` or `"GPU"`."""
    # Does not start TensorFlow's devices, which may still have to be set up.
    is_gpu = _chosen.get() == "GPU" or tf.config.get_visible_devices("GPU")
    return "GPU" if is_gpu else "CPU"


def uses_onednn() -> bool:
    """Whether TensorFlow computes on the CPU by the kernels of oneDNN.

    It does by itself on processors with AVX-512 VNNI, on others if the environment variable
    `TF_ENABLE_ONEDNN_OPTS` is 1, and nowhere if it is 0.
    """
    try:
        from tensorflow.python.util import _pywrap_util_port as port
    except ImportError:
        return False  # nothing else depends on it than which product is the faster
    return bool(port.IsMklEnabled())


@contextlib.contextmanager
def attribute(owners: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of objects for the time of the `with` block.

    Args:
        owners: Objects that have it.
        name: Its name.
        value: What all of them have inside of the block.
    """
    before = [(owner, getattr(owner, name)) for owner in owners]
    for owner, _ in before:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, own in before:
            setattr(owner, name, own)
