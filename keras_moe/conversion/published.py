"""Mixtures of published checkpoints: their experts and routers in this package's layers."""

import os
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.conversion.tensor_files import TensorFiles
from keras_moe.layers.experts import FeedForwardExperts, GatedExperts
from keras_moe.layers.gating import TopKGating
from keras_moe.layers.gshard_gating import GShardGating
from keras_moe.layers.moe import MoE


class _Layout(NamedTuple):
    """Names of a block's tensors, all of them transposed: `(out, in)`.

    Attributes:
        router: `(E, D)`.
        kernels: Those of an expert, in the order of the layer's; the last `(D, H)`,
            the others `(H, D)`.
    """

    router: str
    kernels: tuple[str, ...]


def load_mixtral(
    path: str | os.PathLike,
    block: int,
    mixture: MoE | None = None,
    *,
    k: int = 2,
    prefix: str = "",
    dtype: Any = None,
) -> MoE:
    """The mixture of one block of a Mixtral checkpoint, from safetensors files.

    $y = \\sum_{i \\in TopK} \\mathrm{Softmax}(TopK(x W_g))_i \\, SwiGLU_i(x)$, which is
    `TopKGating(k)` over `GatedExperts`. Read are
    `model.layers.{block}.block_sparse_moe.gate.weight` and
    `...experts.{e}.w1.weight` (the activated product), `w3` (the linear one), `w2` (the
    output), one tensor at a time: there is never more than one of them in memory beside
    the layer.

    Args:
        path: A `.safetensors` file, an index `.json` of several, or a folder with
            `model.safetensors.index.json` or `model.safetensors`. Tensors are float32,
            float16 or bfloat16.
        block: Int. Which block, from 0.
        mixture: A `MoE` of `GatedExperts` without bias and of a gate without bias, built
            or not, to be filled; None makes one. Of a gate that chooses or weighs in
            another way a warning tells. Defaults to `None`.
        k: Int. Experts for each token of the layer that is made
            (`num_experts_per_tok` of the checkpoint's config). Defaults to `2`.
        prefix: What all names begin with. Defaults to `""`.
        dtype: Policy of the layer that is made; `"bfloat16"` keeps weights in that
            type. None means Keras' own. Defaults to `None`.

    Returns:
        The built `MoE`, `mixture` itself if it was given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is not one of safetensors; a tensor is missing or has
            another shape; `mixture` has other sizes, experts, activations or biases, or
            a gate without one kernel.
        ImportError: safetensors is not installed (`keras-moe[weights]`).

    Example:

    >>> import safetensors.numpy, tempfile
    >>> name = "model.layers.0.block_sparse_moe"
    >>> tensors = {f"{name}.gate.weight": np.ones((4, 8))}
    >>> for e in range(4):
    ...     for w, shape in {"w1": (16, 8), "w2": (8, 16), "w3": (16, 8)}.items():
    ...         tensors[f"{name}.experts.{e}.{w}.weight"] = np.ones(shape)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors.numpy.save_file(tensors, f"{folder}/model.safetensors")
    ...     layer = keras_moe.conversion.load_mixtral(folder, block=0)
    >>> layer.num_experts, layer.experts.hidden_units
    (4, 16)

    Reference:
        Jiang et al. 2024, "Mixtral of Experts", arXiv 2401.04088, section 2.1.
    """
    block = checks.verify_int(block, "block", 0)
    layer = f"{prefix}model.layers.{block}.block_sparse_moe"
    kernels = tuple(f"{layer}.experts.{{}}.{w}.weight" for w in ("w1", "w3", "w2"))
    layout = _Layout(f"{layer}.gate.weight", kernels)
    k = checks.verify_k(k)

    def make(num_experts, hidden_units):
        experts = GatedExperts(num_experts, hidden_units, dtype=dtype)
        return MoE(experts, TopKGating(k, dtype=dtype), dtype=dtype)

    routing = {"k": k, "normalization": "selected"}
    return _load(TensorFiles(path), layout, mixture, GatedExperts, make, routing)


def load_switch(
    path: str | os.PathLike,
    block: int,
    mixture: MoE | None = None,
    *,
    stack: str = "encoder",
    prefix: str = "",
    dtype: Any = None,
) -> MoE:
    """The mixture of one block of a Switch Transformer, from safetensors files.

    $y = p_i(x) E_i(x)$ with $p = \\mathrm{Softmax}(x W_g)$ and $i$ its largest entry,
    $E(x) = \\max(x W_1, 0) W_2$: `TopKGating(1, normalization="all")` over
    `FeedForwardExperts`. Names are those of Hugging Face's T5 models:
    `encoder.block.{block}.layer.1.mlp.router.classifier.weight` and
    `...mlp.experts.expert_{e}.wi.weight`, `wo`; in the decoder `layer.2`. Only every
    other block of such a model has a mixture. Read one tensor at a time, as by
    `load_mixtral`.

    No token is dropped, unless `mixture` says so by a capacity; the models were trained
    with one, and with a jitter of the router's inputs, which is left out.

    Args:
        path: As for `load_mixtral`.
        block: Int. Which block of the stack, from 0.
        mixture: A `MoE` of `FeedForwardExperts` with one hidden layer without bias and
            of a gate without bias, built or not, to be filled; None makes one. Defaults
            to `None`.
        stack: `"encoder"` or `"decoder"`. Defaults to `"encoder"`.
        prefix: What all names begin with. Defaults to `""`.
        dtype: Policy of the layer that is made. None means Keras' own. Defaults to
            `None`.

    Returns:
        The built `MoE`, `mixture` itself if it was given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: As for `load_mixtral`; `stack` is unknown.
        ImportError: safetensors is not installed (`keras-moe[weights]`).

    Example:

    >>> import safetensors.numpy, tempfile
    >>> name = "encoder.block.1.layer.1.mlp"
    >>> tensors = {f"{name}.router.classifier.weight": np.ones((4, 8))}
    >>> for e in range(4):
    ...     for w, shape in {"wi": (16, 8), "wo": (8, 16)}.items():
    ...         tensors[f"{name}.experts.expert_{e}.{w}.weight"] = np.ones(shape)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     safetensors.numpy.save_file(tensors, f"{folder}/model.safetensors")
    ...     layer = keras_moe.conversion.load_switch(folder, block=1)
    >>> layer.num_experts, layer.gating.k
    (4, 1)

    Reference:
        Fedus et al. 2022, "Switch Transformers", arXiv 2101.03961, section 2.1.
    """
    block = checks.verify_int(block, "block", 0)
    checks.verify_choice(stack, "stack", ("encoder", "decoder"))
    place = {"encoder": 1, "decoder": 2}[stack]  # after self- and cross-attention
    layer = f"{prefix}{stack}.block.{block}.layer.{place}.mlp"
    kernels = tuple(f"{layer}.experts.expert_{{}}.{w}.weight" for w in ("wi", "wo"))
    layout = _Layout(f"{layer}.router.classifier.weight", kernels)

    def make(num_experts, hidden_units):
        experts = FeedForwardExperts(num_experts, hidden_units, dtype=dtype)
        gating = TopKGating(1, normalization="all", dtype=dtype)
        return MoE(experts, gating, dtype=dtype)

    routing = {"k": 1, "normalization": "all"}
    return _load(TensorFiles(path), layout, mixture, FeedForwardExperts, make, routing)


def _load(files, layout, mixture, kind, make, routing):
    num_experts, features = _two(files, layout.router)
    hidden_units, _ = _two(files, layout.kernels[0].format(0))
    hidden = (hidden_units, features)
    shapes = [hidden] * (len(layout.kernels) - 1) + [hidden[::-1]]
    kernels = list(zip(layout.kernels, shapes, strict=True))
    for e in range(num_experts):  # before anything is changed
        for name, shape in kernels:
            files.verify(name.format(e), shape)
    if mixture is None:
        mixture = make(num_experts, hidden_units)
    else:
        _verify_fits(mixture, kind, num_experts, hidden_units, features)
    if not mixture.built:
        mixture.build((None, features))
        mixture.built = True
    _verify_gate(mixture, (features, num_experts))
    _warn_of_routing(mixture, routing)
    for variable, (name, _) in zip(mixture.experts.kernels, kernels, strict=True):
        _fill(variable, lambda e, name=name: files.read(name.format(e)).T)
    router = files.read(layout.router)
    mixture.gating.gate_kernel.assign(router.T.astype("float32"))
    return mixture


def _two(files, name):
    shape = files.shape(name)
    if len(shape) != 2:
        raise ValueError(
            f"`path` must hold a tensor {name!r} of rank 2. Received: one of the shape "
            f"{shape}. Is it another model?"
        )
    return shape


def _verify_fits(mixture, kind, num_experts, hidden_units, features):
    """Raises unless a mixture can take the weights of a checkpoint."""
    experts = getattr(mixture, "experts", None)
    hidden: Any = getattr(experts, "hidden_units", None)
    hidden = hidden[0] if np.shape(hidden) == (1,) else hidden
    has = {
        "experts": type(experts).__name__,
        "num_experts": getattr(experts, "num_experts", None),
        "hidden_units": hidden,
        "output_units": getattr(experts, "output_units", None) or features,
        "use_bias": getattr(experts, "use_bias", None),
        "quantization_mode": getattr(experts, "quantization_mode", None),
        "activation": _name_of(getattr(experts, "activation", None)),
        "mixture's activation": _name_of(getattr(mixture, "activation", None)),
        "features": features,
        "gate's use_bias": getattr(getattr(mixture, "gating", None), "use_bias", None),
    }
    if getattr(mixture, "built", False) and isinstance(experts, kind):
        has["features"] = experts.kernels[0].shape[1]
    wanted = {
        "experts": kind.__name__,
        "num_experts": num_experts,
        "hidden_units": hidden_units,
        "output_units": features,
        "use_bias": False,
        "quantization_mode": None,
        "activation": {GatedExperts: "silu", FeedForwardExperts: "relu"}[kind],
        "mixture's activation": "linear",
        "features": features,
        "gate's use_bias": False,
    }
    other = {name: has[name] for name in wanted if has[name] != wanted[name]}
    if other or not isinstance(mixture, MoE):
        listed = ", ".join(f"{name}={wanted[name]}" for name in other or wanted)
        received = ", ".join(f"{name}={value}" for name, value in other.items())
        raise ValueError(
            f"`mixture` must be a MoE that the checkpoint's weights fit: {listed}. "
            f"Received: {received}, mixture={mixture!r}. "
            "Leave it out to have one made."
        )


def _name_of(activation):
    if activation is None:
        return None
    name = keras.activations.serialize(activation)
    return name if isinstance(name, str) else repr(activation)


def _verify_gate(mixture, shape):
    """Raises unless the gate of a built mixture has one kernel of a shape."""
    gate = mixture.gating
    kernel = getattr(gate, "gate_kernel", None)
    received = None if kernel is None else tuple(kernel.shape)
    if received != shape:
        raise ValueError(
            f"`mixture` must have a gate with a `gate_kernel` of the shape {shape}. "
            f"Received: a {type(gate).__name__} with {received} in {mixture.name!r}, a "
            f"{type(mixture).__name__}. Leave it out to have one made."
        )


def _warn_of_routing(mixture, routing):
    """Warns of a mixture that uses the experts in another way than the published."""
    gate = mixture.gating
    wanted = {**routing, "scaling_factor": 1.0}
    other = {name: getattr(gate, name, None) for name in wanted}
    plain = isinstance(gate, TopKGating) and not isinstance(gate, GShardGating)
    if plain and other == wanted and mixture.shared_experts is None:
        return
    given = ", ".join(f"{name}={value!r}" for name, value in other.items())
    shared = "" if mixture.shared_experts is None else " and shared experts"
    warnings.warn(
        f"{mixture.name}: computes something else than the published mixture, a "
        f"TopKGating({', '.join(f'{n}={v!r}' for n, v in routing.items())}) alone. It "
        f"has a {type(gate).__name__} with {given}{shared}. Leave `mixture` out to have "
        "one made.",
        stacklevel=4,
    )


def _fill(variable, read):
    """Sets a stack of weights, one expert after the other."""
    value = variable.value
    in_place = type(variable) is keras.Variable and not tf.distribute.has_strategy()
    if in_place and not hasattr(value, "values"):
        for e in range(variable.shape[0]):
            rows = tf.cast(read(e), value.dtype)[tf.newaxis]
            value.scatter_update(tf.IndexedSlices(rows, [e]))
        return
    # Shards on several devices are set as a whole.
    stack = [tf.cast(read(e), variable.dtype) for e in range(variable.shape[0])]
    variable.assign(tf.stack(stack))
