"""A dense model made sparse: feed-forward pairs become mixtures of their copies."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_moe import checks
from keras_moe.conversion.blocks import blocks_of, dense_of, with_network
from keras_moe.conversion.pairs import (
    Pair,
    chosen,
    find_pairs,
    named_layers,
    rules_of,
    without_overlap,
)
from keras_moe.conversion.rebuilding import (
    array_of,
    is_graph,
    rebuild,
    verify_specs,
)
from keras_moe.conversion.tracing import trace
from keras_moe.layers.experts import FeedForwardExperts
from keras_moe.layers.gating import k_of
from keras_moe.layers.moe import MoE
from keras_moe.layers.noisy_gating import NoisyTopKGating

# How far outputs may be from those of before, relative to their size.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
_ROWS = 16


def upcycle(
    model: keras.layers.Layer,
    layers: str | Iterable[str] | Callable | None = None,
    *,
    num_experts: int,
    k: int | None = None,
    gating: Callable[[], keras.layers.Layer] | None = None,
    split: int = 1,
    noise: float = 0.0,
    mixture: Callable[..., MoE] = MoE,
    inputs: Any = None,
    seed: int | None = None,
) -> Any:
    """A sparse model from a trained dense one, with the same outputs at the start.

    Feed-forward pairs, a `Dense` layer and the `Dense` that takes all it gives, become
    mixtures whose experts are copies of the pair: $y = \\sum_i G(x)_i E_i(x) = E(x)$
    where all experts are $E$ and the gates of a token sum to 1. Trained on, the experts
    grow apart.

    Activation, `ReLU` and `Dropout` layers between the two belong to the pair. Pairs are
    found in `Sequential` and functional models, in models inside of these, and in
    layers and models of a class that hold both as attributes, whatever lines of Python
    call them: what feeds what is read off a trace of the model. A pair that is called
    twice becomes one mixture that is called twice.

    Args:
        model: A built Keras model, or a layer that holds layers. It stays as it is.
        layers: Which pairs: the name of the first `Dense` of one, or names, or a
            function of that layer that returns a bool. A name may begin with the
            names of the layers around it, `"encoder_0/intermediate"`. None takes all,
            of pairs that overlap the first. Defaults to `None`.
        num_experts: Int. Experts of each mixture.
        k: Int or None. Experts for each token, for the gate that is made if `gating` is
            None: a `NoisyTopKGating` whose `gate_kernel` is drawn with a standard
            deviation of 0.02, as in the paper. None means 2 complete copies, or 1 if
            there are no more. Defaults to `None`.
        gating: Function without arguments that makes a new gate for each mixture. A
            gate whose gates do not sum to 1 is warned of. Defaults to `None`.
        split: Int. Into how many experts each copy is dealt (fine-grained experts):
            each has this part of the hidden units. `num_experts` and the gate's k are
            multiples of it, and the parts of a copy start with the same column of
            `gate_kernel`, so that they are chosen together. Defaults to `1`.
        noise: Float. Standard deviation of what is added to every kernel of every
            expert, in standard deviations of that kernel. Outputs then differ from the
            start. Defaults to `0.0`.
        mixture: Makes the layer, a `MoE`, called with experts and gate and `name`,
            `activation`, `dtype`; for options of `MoE`, a `functools.partial` of it.
            Shared experts change outputs, of which a warning tells. Defaults to `MoE`.
        inputs: Specs of the model's inputs, anything with a shape and a dtype:
            `keras.Input`, `tf.TensorSpec`, an array. Needed where the model doesn't
            say, as models of a class of their own. Defaults to `None`.
        seed: Int or None. Seed of `noise`. Defaults to `None`.

    Returns:
        A new model of the same class, with weights of its own, not compiled. A mixture
        is called after the first layer of its pair, `<name>_moe`. A functional model of
        a class of its own is a plain one if pairs stand in its own graph.

    Raises:
        ValueError: `layers` names no pair; there is none; a size is not a multiple of
            `split`; parts of a copy would not be chosen together; the model's inputs
            are not known; a layer that holds a pair cannot be made from its config.

    Dropout between the two layers is that of the experts' hidden units. A mixture leaves
    out tokens that a mask marks as padding, whose output is zero.

    A model that was rebuilt of layers only (`Sequential`, functional) is saved and
    loaded as any other, and so is a `MoETransformerBlock`, which gets the mixture as its
    `moe`. Another layer of a class of its own holds a mixture where its config says
    `Dense`: such a model is brought back by upcycling again and `load_weights`.

    Example:

    >>> dense = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(32, "gelu"), keras.layers.Dense(8)]
    ... )
    >>> sparse = keras_moe.upcycle(dense, num_experts=4, k=2)
    >>> x = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")
    >>> np.testing.assert_allclose(sparse(x), dense(x), atol=1e-5)

    Reference:
        Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from
        Dense Checkpoints", arXiv 2212.05055; `split`: He et al. 2024, "Upcycling Large
        Language Models into Mixture of Experts", arXiv 2410.07524, section 3.2.
    """
    num_experts = checks.verify_positive_int(num_experts, "num_experts")
    split = checks.verify_positive_int(split, "split")
    noise = checks.verify_weight(noise, "noise")
    seed = None if seed is None else checks.verify_int(seed, "seed", 0, 2**62)
    if num_experts % split:
        raise ValueError(
            "`num_experts` must be a multiple of `split`, since every copy is dealt "
            f"into so many. Received: num_experts={num_experts}, split={split}. Pass "
            f"num_experts={max(1, num_experts // split) * split}, for example."
        )
    if gating is None:
        k = split * min(2, num_experts // split) if k is None else k
        gating = _default_gating(checks.verify_k(k, num_experts))
    elif not callable(gating) or isinstance(gating, keras.layers.Layer):
        raise ValueError(
            "`gating` must be a function that makes a gate, since every mixture has its "
            f"own. Received: gating={gating!r}. Pass `lambda: TopKGating(k=2)`, for "
            "example."
        )
    if not callable(mixture) or isinstance(mixture, keras.layers.Layer):
        raise ValueError(
            "`mixture` must make a layer of experts and a gate. Received: "
            f"mixture={mixture!r}. Pass a functools.partial of MoE, for example."
        )
    inputs = inputs_of(model, inputs)
    found, others = find_pairs(model, inputs)
    labels = chosen(
        [(pair.label, pair.first) for pair in found],
        layers,
        "the first Dense of a feed-forward pair",
        others,
    )
    pairs = [pair for pair in found if pair.label in labels]
    apart = without_overlap(pairs)
    if layers is not None and len(apart) < len(pairs):
        lost = [pair.label for pair in pairs if pair not in apart]
        raise ValueError(
            "`layers` must name pairs that share no layer. Received: "
            f"layers={layers!r}, where {lost} overlap with those before. Leave these out."
        )
    generator = np.random.default_rng(seed)
    made = {}
    for pair in apart:
        gate = gating()
        _verify_k(gate, k, num_experts, split)
        made[id(pair.second)] = _mixture_of(
            pair, gate, mixture, num_experts, split, noise, generator
        )
    replacements = dict(made)
    left_out = {id(x) for pair in apart for x in (pair.first, *pair.between)}
    for block in blocks_of(model):
        # As an argument of the block its config tells of the mixture.
        first, second = dense_of(block)
        if id(first) in left_out and id(second) in made:
            replacements[id(block)] = with_network(block, made[id(second)])
    new_model = rebuild(model, replacements, left_out, inputs)
    _verify_calls(new_model, apart, made, inputs)
    return new_model


def inputs_of(model: Any, inputs: Any) -> Any:
    """Specs of a model's inputs: those given, or its own.

    Raises:
        ValueError: The model is not built, or does not know them.
    """
    if not isinstance(model, keras.layers.Layer) or not model.built:
        raise ValueError(
            "`model` must be a built Keras model or layer. Received: "
            f"model={model!r}. Call it on a batch first, or load its weights."
        )
    if inputs is not None:
        verify_specs(inputs)
        return inputs
    if is_graph(model):
        return model.input
    if isinstance(model, keras.Sequential) and model.inputs:
        return model.inputs[0]
    raise ValueError(
        "`inputs` must be given for a model that does not know its own. Received: "
        f"inputs=None, {model.name!r}, a {type(model).__name__}. Pass for example "
        "keras.Input((None,), dtype='int32')."
    )


def _default_gating(k):
    def make():
        # Paper: section A.1.1, a random normal router.
        kernel = keras.initializers.RandomNormal(stddev=0.02)
        return NoisyTopKGating(k, gate_initializer=kernel)

    return make


def _verify_k(gate, k, num_experts, split):
    own = k_of(gate)
    if k is not None and own is not None and own != k:
        raise ValueError(
            f"`k` must be that of the gate. Received: k={k}, a "
            f"{type(gate).__name__} with k={own}. Leave `k` out, `gating` says it."
        )
    if split > 1 and own is not None and own % split:
        raise ValueError(
            "`k` must be a multiple of `split`, so that all parts of a copy are chosen "
            f"together. Received: k={own}, split={split}. Pass k={split}, or "
            f"k={2 * split}."
        )
    if own is not None:
        checks.verify_k(own, num_experts)


def _mixture_of(pair: Pair, gate, mixture, num_experts, split, noise, generator):
    """A built mixture of copies of a pair."""
    first, second = pair.first, pair.second
    hidden = first.units
    if hidden % split:
        raise ValueError(
            "`split` must divide the hidden units. Received: "
            f"split={split}, {hidden} units of {pair.label!r}. Pass a divisor, or leave "
            "the layer out of `layers`."
        )
    use_bias = first.use_bias or second.use_bias
    experts = FeedForwardExperts(
        num_experts,
        hidden // split,
        output_units=second.units,
        activation=pair.activations[0] if pair.activations else None,
        use_bias=use_bias,
        dropout=pair.dropout,
        dtype=second.dtype_policy,
        **rules_of(pair),
    )
    experts.trainable = first.trainable or second.trainable
    layer = mixture(
        experts,
        gate,
        name=f"{pair.label.replace('/', '_')}_moe",
        activation=second.activation,
        dtype=second.dtype_policy,
    )
    if not isinstance(layer, MoE):
        raise ValueError(
            "`mixture` must return a MoE of the experts and the gate. Received: "
            f"mixture={mixture!r}, which returned {layer!r}. Pass a functools.partial "
            "of MoE, for example."
        )
    layer.build(pair.shape)
    layer.built = True
    copies = num_experts // split
    parts = [_Part(pair, split, p) for p in range(split)]
    for i, kernel in enumerate(experts.kernels):
        values = [part.kernels[i] for part in parts]
        _fill(kernel, np.stack(values * copies), noise, generator)
    for i, bias in enumerate(experts.biases):
        _fill(bias, np.stack([part.biases[i] for part in parts] * copies))
    if split > 1:
        _join_parts(gate, split)
    if not noise:
        _verify_same(pair, layer, split)
    return layer


class _Part:
    """One of the experts into which a pair is dealt.

    $E(x) = \\sum_p \\mathrm{act}(x W_1^{(p)} + b_1^{(p)}) W_2^{(p)} + b_2$. Gates that
    sum to 1 give each of m parts 1 / m of what a copy gets: so $W_2^{(p)}$ is m times
    as large, and every part has all of $b_2$.
    """

    def __init__(self, pair, split, p):
        first, second = pair.first, pair.second
        hidden = first.units // split
        own = slice(p * hidden, (p + 1) * hidden)
        self.kernels = [
            _array(first.kernel)[:, own],
            split * _array(second.kernel)[own],
        ]
        zeros = np.zeros(first.units), np.zeros(second.units)
        self.biases = [
            (_array(first.bias) if first.use_bias else zeros[0])[own],
            _array(second.bias) if second.use_bias else zeros[1],
        ]


def _array(variable):
    # Half precision as float32: NumPy draws and stacks no bfloat16.
    value = array_of(variable)
    return value if value.dtype == np.float64 else value.astype("float32")


def _fill(variable, values, noise=0.0, generator=None):
    if noise:
        scale = noise * values.std()
        values = values + scale * generator.standard_normal(values.shape)
    variable.assign(values.astype("float32" if noise else values.dtype))


def _join_parts(gate, split):
    """Gives the parts of a copy the same columns in all weights of a gate."""
    names = [weight.name for weight in gate.weights]
    if "gate_kernel" not in names:
        raise ValueError(
            "`gating` must make a gate with a `gate_kernel`, (features, num_experts), "
            "so that the parts of a copy are chosen together. Received: "
            f"split={split}, a {type(gate).__name__} with the weights {names}. Use "
            "TopKGating or NoisyTopKGating, or split=1."
        )
    for weight in gate.weights:
        value = array_of(weight)
        if value.ndim and value.shape[-1] == gate.num_experts:
            weight.assign(np.repeat(value[..., ::split], split, axis=-1))


def _verify_same(pair, layer, split):
    """Warns, or raises, if a mixture computes something else than its pair."""
    dtype = layer.compute_dtype
    rows = np.random.default_rng(0).standard_normal((_ROWS, pair.first.kernel.shape[0]))
    rows = tf.cast(rows, dtype)
    wanted = pair.first(rows)
    for between in pair.between:
        if not isinstance(between, keras.layers.Dropout):
            wanted = between(wanted)
    wanted = tf.cast(pair.second(wanted), tf.float64)
    apart = tf.reduce_max(tf.abs(tf.cast(layer(rows), tf.float64) - wanted))
    if hasattr(layer, "balance"):
        layer.balance.reset_state()  # of rows that are no one's data
    size = tf.maximum(tf.reduce_max(tf.abs(wanted)), 1.0)
    ratio = float(apart / size)
    if ratio <= _TOLERANCE.get(dtype, 1e-5):
        return
    if layer.shared_experts is not None:
        warnings.warn(
            f"{layer.name}: outputs differ from those of {pair.label!r} by {ratio:.2g} "
            "of their size, since its shared experts add to them. The model has to "
            "learn it in training; shared experts whose output kernel is zeros change "
            "nothing at the start.",
            stacklevel=4,
        )
        return
    gate = type(layer.gating).__name__
    if split > 1:
        raise ValueError(
            "`split` must go with a gate that chooses the parts of a copy together, and "
            f"gates that sum to 1. Received: split={split}, a {gate}, with which outputs "
            f"of {pair.label!r} differ by {ratio:.2g} of their size. Use "
            'NoisyTopKGating with normalization="selected", or split=1.'
        )
    warnings.warn(
        f"{layer.name}: outputs differ from those of {pair.label!r} by {ratio:.2g} of "
        f"their size, since the gates of {gate} do not sum to 1. The model has to learn "
        'it in training; gates with normalization="selected" change nothing.',
        stacklevel=4,
    )


def _verify_calls(new_model, pairs, made, inputs):
    """Raises unless mixtures run wherever their pairs did."""
    inner = {id(layer) for _, layer in named_layers(new_model)}
    mixtures = [mixture for mixture in made.values() if id(mixture) in inner]
    seen = trace(new_model, inputs, mixtures, _nothing_of_its_shape)
    for pair in pairs:
        now = len(seen.of(made[id(pair.second)]))
        if pair.num_calls != now:
            raise ValueError(
                "`layers` must name pairs that are called through the attributes that "
                f"hold them. Received: {pair.label!r}, called {pair.num_calls} times, "
                f"whose mixture is called {now} times. Leave it out of `layers`."
            )


def _nothing_of_its_shape(layer, inputs):
    units = layer.compute_output_shape(inputs.shape)[-1]
    return tf.zeros([*tf.unstack(tf.shape(inputs))[:-1], units], layer.compute_dtype)
