"""Every public layer once: how to make it and what to feed it.

A new layer adds one row here and is then held to every property of
`test_conformance.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from keras_moe import layers, models
from tests import own_layers


@dataclass(frozen=True)
class Descriptor:
    """One layer of the table.

    Attributes:
        name: Name of the row.
        make: Makes the layer; takes keyword arguments of `keras.layers.Layer`.
        shape: Shape of an input, the batch dimension first.
        of: The public class the row stands for.
        dynamic_axes: Axes that may be unknown when the layer is traced.
        float32_only: Whether the result is float32 under half-precision policies.
        integer_inputs: Whether inputs are token ids.
        takes_nothing: Whether a batch may be empty.
        result: Picks from the outputs the tensor that is compared.
    """

    name: str
    make: Callable
    shape: tuple
    of: type
    dynamic_axes: tuple = (0,)
    float32_only: bool = False
    integer_inputs: bool = False
    takes_nothing: bool = True
    result: Callable = lambda outputs: outputs

    def inputs(self, batch_size=None, seed=0):
        shape = list(self.shape)
        if batch_size is not None:
            shape[0] = batch_size
        rng = np.random.default_rng(seed)
        if self.integer_inputs:
            return rng.integers(1, 20, size=shape).astype("int32")
        return rng.normal(size=shape).astype("float32")


def _moe(gating, **fixed):
    def make(**kwargs):
        experts = layers.FeedForwardExperts(
            6, hidden_units=8, dtype=kwargs.get("dtype")
        )
        return layers.MoE(experts, gating(), **fixed, **kwargs)

    return make


def _random_gate(k=2, **kwargs):
    # Not the default of zeros, so that equal logits do not hide differences.
    return layers.NoisyTopKGating(
        k=k,
        gate_initializer="glorot_normal",
        noise_initializer="glorot_normal",
        **kwargs,
    )


def _moe_of(experts, **fixed):
    def make(**kwargs):
        own = experts(dtype=kwargs.get("dtype"))
        return layers.MoE(own, _random_gate(), **fixed, **kwargs)

    return make


def _moe_with_shared_experts(**kwargs):
    dtype = kwargs.get("dtype")
    shared = keras.Sequential(
        [
            keras.layers.Dense(5, "silu", dtype=dtype),
            keras.layers.Dropout(0.1, dtype=dtype),
            keras.layers.Dense(4, dtype=dtype),
        ]
    )
    experts = layers.GatedExperts(6, hidden_units=8, dtype=dtype)
    return layers.MoE(experts, _random_gate(), shared_experts=shared, **kwargs)


def _expert_list(kind=layers.ExpertList, **kwargs):
    dense = keras.layers.Dense(6, dtype=kwargs.get("dtype"))
    deep = keras.Sequential(
        [
            keras.layers.Dense(4, "tanh", dtype=kwargs.get("dtype")),
            keras.layers.Dropout(0.2, dtype=kwargs.get("dtype")),
            keras.layers.Dense(6, dtype=kwargs.get("dtype")),
        ]
    )
    other = keras.layers.Dense(6, "relu", dtype=kwargs.get("dtype"))
    return kind([dense, deep, other], **kwargs)


def _language_model(**kwargs):
    moe = layers.MoE(
        layers.FeedForwardExperts(4, hidden_units=8),
        _random_gate(),
        activation="sigmoid",
    )
    return models.MoELanguageModel(20, 8, middle=moe, **kwargs)


@keras.saving.register_keras_serializable(package="conformance")
class ToItself(keras.layers.Layer):
    """Makes one input of a layer that takes two."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer
        self.supports_jit = layer.supports_jit

    def call(self, inputs, training=None):
        if isinstance(self.layer, layers.MultiplicativeAttention):
            return self.layer(inputs, inputs)
        if isinstance(self.layer, layers.MoE):
            seen = inputs[..., :3]
            return self.layer(inputs, training=training, gate_inputs=seen)
        if isinstance(self.layer, layers.MoETransformerBlock):
            return self.layer(inputs, inputs, training=training)
        if isinstance(self.layer, layers.AttentionLSTM):
            return self.layer(inputs, inputs, training=training)[0]
        return self.layer((inputs, inputs), training=training)

    def compute_output_shape(self, input_shape):
        if isinstance(self.layer, models.MoETranslator):
            return (*input_shape, self.layer.vocabulary_size)
        last = input_shape[-1]
        if isinstance(self.layer, layers.AttentionLSTM):
            last = self.layer.cell.output_size
        return (*input_shape[:-1], last)

    def get_config(self):
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer}

    @classmethod
    def from_config(cls, config):
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})


def _translator(**kwargs):
    def mixture(name):
        return layers.MoE(
            layers.FeedForwardExperts(4, hidden_units=8),
            _random_gate(),
            activation="sigmoid",
            name=name,
        )

    return models.MoETranslator(
        20,
        8,
        encoder_middle=mixture("encoder_moe"),
        decoder_middle=mixture("decoder_moe"),
        **kwargs,
    )


def _gates(outputs):
    return outputs.gates


GATE = {"float32_only": True, "result": _gates}

DESCRIPTORS = [
    Descriptor(
        "SoftmaxGating",
        lambda **kw: layers.SoftmaxGating(
            num_experts=5, gate_initializer="glorot_normal", **kw
        ),
        (7, 4),
        layers.SoftmaxGating,
        **GATE,
    ),
    Descriptor(
        "TopKGating",
        lambda **kw: layers.TopKGating(k=2, num_experts=5, **kw),
        (7, 4),
        layers.TopKGating,
        **GATE,
    ),
    Descriptor(
        "NoisyTopKGating",
        lambda **kw: _random_gate(num_experts=5, **kw),
        (7, 4),
        layers.NoisyTopKGating,
        **GATE,
    ),
    Descriptor(
        "LossFreeGating",
        lambda **kw: layers.LossFreeGating(k=2, num_experts=5, **kw),
        (7, 4),
        layers.LossFreeGating,
        **GATE,
    ),
    Descriptor(
        "LossFreeGating, softmax scores within groups",
        lambda **kw: layers.LossFreeGating(
            k=2,
            num_experts=8,
            scores="softmax",
            normalization="none",
            num_groups=2,
            num_kept_groups=1,
            **kw,
        ),
        (7, 4),
        layers.LossFreeGating,
        **GATE,
    ),
    Descriptor(
        "MoE, second choice by lot",
        _moe(lambda: layers.GShardGating(seed=1)),
        (3, 5, 4),
        layers.GShardGating,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoE, second choice by threshold",
        _moe(
            lambda: layers.GShardGating(second_policy="threshold", second_threshold=0.3)
        ),
        (3, 5, 4),
        layers.GShardGating,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoE, loss-free",
        _moe(lambda: layers.LossFreeGating(k=2)),
        (3, 5, 4),
        layers.LossFreeGating,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "NoisyTopKGating, annealed, with every loss and jitter",
        lambda **kw: _random_gate(
            num_experts=5,
            noise_stddev=keras.optimizers.schedules.PolynomialDecay(1.0, 10, 0.0),
            scaling_factor=2.5,
            input_jitter=0.01,
            switch_loss_weight=0.01,
            z_loss_weight=0.001,
            **kw,
        ),
        (7, 4),
        layers.NoisyTopKGating,
        **GATE,
    ),
    Descriptor(
        "SwitchGating",
        lambda **kw: layers.SwitchGating(num_experts=5, **kw),
        (7, 4),
        layers.SwitchGating,
        **GATE,
    ),
    Descriptor(
        "FeedForwardExperts",
        lambda **kw: layers.FeedForwardExperts(3, hidden_units=8, **kw),
        (3, 4, 5),
        layers.FeedForwardExperts,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "FeedForwardExperts, deep with bias",
        lambda **kw: layers.FeedForwardExperts(
            3, [8, 6], output_units=2, activation="tanh", use_bias=True, **kw
        ),
        (3, 4, 5),
        layers.FeedForwardExperts,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "FeedForwardExperts, regularized, constrained and frozen",
        lambda **kw: layers.FeedForwardExperts(
            3,
            hidden_units=8,
            use_bias=True,
            kernel_regularizer="l2",
            bias_regularizer="l1",
            kernel_constraint=keras.constraints.MaxNorm(2.0),
            bias_constraint="non_neg",
            frozen_experts=(1,),
            **kw,
        ),
        (3, 4, 5),
        layers.FeedForwardExperts,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "GatedExperts, with bias",
        lambda **kw: layers.GatedExperts(
            3, hidden_units=8, output_units=2, activation="gelu", use_bias=True, **kw
        ),
        (3, 4, 5),
        layers.GatedExperts,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "FeedForwardExperts, low-rank",
        lambda **kw: layers.FeedForwardExperts(
            3, hidden_units=8, use_bias=True, lora_rank=2, lora_alpha=4.0, **kw
        ),
        (3, 4, 5),
        layers.FeedForwardExperts,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "FeedForwardExperts, with dropout",
        lambda **kw: layers.FeedForwardExperts(3, [8, 6], dropout=0.2, seed=1, **kw),
        (3, 4, 5),
        layers.FeedForwardExperts,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "MoE of GatedExperts with shared experts",
        _moe_with_shared_experts,
        (3, 5, 4),
        layers.MoE,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "HierarchicalMoE, k=1 of both full softmaxes, with bias",
        lambda **kw: layers.HierarchicalMoE(
            layers.FeedForwardExperts(6, hidden_units=8, dtype=kw.get("dtype")),
            num_groups=3,
            k=(1, 1),
            primary_gating=_random_gate(1, normalization="all", use_bias=True),
            normalization="all",
            use_gate_bias=True,
            noise_stddev=keras.optimizers.schedules.PolynomialDecay(1.0, 10, 0.5),
            z_loss_weight=0.001,
            **kw,
        ),
        (3, 5, 4),
        layers.HierarchicalMoE,
        dynamic_axes=(0, 1),
    ),
    Descriptor("MoE", _moe(_random_gate), (3, 5, 4), layers.MoE, dynamic_axes=(0, 1)),
    Descriptor(
        "MoE, rank 2, wider output",
        lambda **kw: layers.MoE(
            layers.FeedForwardExperts(6, 8, output_units=3), _random_gate(), **kw
        ),
        (9, 4),
        layers.MoE,
    ),
    Descriptor(
        "MoE, whose gate sees something else",
        lambda **kw: ToItself(_moe(_random_gate)(**kw), **kw),
        (3, 5, 4),
        layers.MoE,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MultiGateMoE",
        lambda **kw: layers.MultiGateMoE(
            layers.FeedForwardExperts(4, hidden_units=8, dtype=kw.get("dtype")), 2, **kw
        ),
        (3, 5, 4),
        layers.MultiGateMoE,
        dynamic_axes=(0, 1),
        result=lambda outputs: keras.ops.concatenate(outputs, axis=-1),
    ),
    Descriptor(
        "MultiGateMoE, sparse gates",
        lambda **kw: layers.MultiGateMoE(
            layers.FeedForwardExperts(6, hidden_units=8, dtype=kw.get("dtype")),
            [_random_gate(), _random_gate(k=3)],
            importance_loss_weight=0.1,
            load_loss_weight=None,
            **kw,
        ),
        (3, 5, 4),
        layers.MultiGateMoE,
        dynamic_axes=(0, 1),
        result=lambda outputs: keras.ops.concatenate(outputs, axis=-1),
    ),
    Descriptor(
        "MoE, softmax gating",
        _moe(lambda: layers.SoftmaxGating(gate_initializer="glorot_normal")),
        (3, 2, 2, 4),
        layers.MoE,
        dynamic_axes=(0, 1, 2),
    ),
    Descriptor(
        "MoE, top-k", _moe(lambda: layers.TopKGating(k=3)), (3, 5, 4), layers.MoE
    ),
    Descriptor(
        "MoE, switch",
        _moe(lambda: layers.SwitchGating(z_loss_weight=0.001)),
        (3, 5, 4),
        layers.MoE,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoE, k=1 of the full softmax",
        _moe(lambda: _random_gate(k=1, normalization="all")),
        (3, 5, 4),
        layers.MoE,
    ),
    Descriptor(
        "MoE, with capacity",
        _moe(_random_gate, capacity_factor=3.0),
        (3, 5, 4),
        layers.MoE,
    ),
    Descriptor(
        "FeedForwardExperts, recomputed",
        lambda **kw: layers.FeedForwardExperts(3, hidden_units=8, recompute=True, **kw),
        (3, 4, 5),
        layers.FeedForwardExperts,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "ExpertList",
        _expert_list,
        (3, 4, 5),
        layers.ExpertList,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "Experts, a user's gated ones",
        lambda **kw: own_layers.GatedExperts(3, 8, **kw),
        (3, 4, 5),
        layers.Experts,
        dynamic_axes=(1,),
    ),
    Descriptor(
        "MoE of a user's gated experts",
        _moe_of(lambda **kw: own_layers.GatedExperts(6, 8, recompute=True, **kw)),
        (3, 5, 4),
        layers.Experts,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoE of a user's gated experts, in blocks",
        _moe_of(lambda **kw: own_layers.GatedExperts(6, 8, computation="blocks", **kw)),
        (3, 5, 4),
        layers.Experts,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoE, only the chosen experts",
        _moe_of(
            lambda **kw: layers.FeedForwardExperts(
                6, 8, use_bias=True, computation="chosen", **kw
            )
        ),
        (3, 5, 4),
        layers.FeedForwardExperts,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoE of a user's gated experts, with capacity",
        _moe_of(lambda **kw: own_layers.GatedExperts(6, 8, **kw), capacity_factor=3.0),
        (3, 5, 4),
        layers.Experts,
    ),
    Descriptor(
        "MoE of a subclass of FeedForwardExperts",
        _moe_of(lambda **kw: own_layers.ResidualExperts(6, 8, use_bias=True, **kw)),
        (3, 5, 4),
        layers.FeedForwardExperts,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoE of a subclass of GatedExperts",
        _moe_of(
            lambda **kw: own_layers.ResidualGatedExperts(
                6, 8, use_bias=True, dropout=0.1, **kw
            )
        ),
        (3, 5, 4),
        layers.GatedExperts,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoE of a subclass of ExpertList",
        _moe_of(lambda **kw: _expert_list(own_layers.HalvedExpertList, **kw)),
        (3, 5, 6),
        layers.ExpertList,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "HierarchicalGating",
        lambda **kw: layers.HierarchicalGating(
            3,
            (2, 1),
            num_experts=6,
            primary_gating=_random_gate(),
            gate_initializer="glorot_normal",
            noise_initializer="glorot_normal",
            **kw,
        ),
        (7, 4),
        layers.HierarchicalGating,
        float32_only=True,
        result=_gates,
    ),
    Descriptor(
        "HierarchicalMoE",
        lambda **kw: layers.HierarchicalMoE(
            layers.FeedForwardExperts(6, hidden_units=8, dtype=kw.get("dtype")),
            num_groups=3,
            k=(2, 1),
            primary_gating=_random_gate(),
            **kw,
        ),
        (3, 5, 4),
        layers.HierarchicalMoE,
        dynamic_axes=(0, 1),
    ),
    # The gate inside a mixture: by itself it returns no tensor of fixed shape.
    Descriptor(
        "BalancedGating",
        _moe(
            lambda: layers.BalancedGating(
                k=2, gate_initializer="glorot_normal", threshold_loss_weight=0.5
            ),
            load_loss_weight=0.0,
        ),
        (3, 5, 4),
        layers.BalancedGating,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "ExpertChoiceGating",
        _moe(lambda: layers.ExpertChoiceGating(1.5)),
        (3, 5, 4),
        layers.ExpertChoiceGating,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "ProjectedLSTMCell",
        lambda **kw: keras.layers.RNN(
            layers.ProjectedLSTMCell(6, projection_units=3, dtype=kw.get("dtype")),
            return_sequences=True,
            **kw,
        ),
        (3, 5, 4),
        layers.ProjectedLSTMCell,
        dynamic_axes=(0,),
    ),
    Descriptor(
        "MoELSTMCell",
        lambda **kw: keras.layers.RNN(
            layers.MoELSTMCell(6, 4, _random_gate(3), dtype=kw.get("dtype")),
            return_sequences=True,
            **kw,
        ),
        (3, 5, 4),
        layers.MoELSTMCell,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoELSTM",
        lambda **kw: layers.MoELSTM(6, 4, _random_gate(3), return_sequences=True, **kw),
        (3, 5, 4),
        layers.MoELSTM,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoELSTM, in segments",
        lambda **kw: layers.MoELSTM(
            6, 4, _random_gate(3), segment_length=2, return_sequences=True, **kw
        ),
        (3, 5, 4),
        layers.MoELSTM,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "SampledSoftmax",
        lambda **kw: layers.SampledSoftmax(20, num_sampled=6, **kw),
        (3, 5, 4),
        layers.SampledSoftmax,
        dynamic_axes=(0, 1),
        float32_only=True,
    ),
    Descriptor(
        "MoELanguageModel, sampled",
        lambda **kw: _language_model(num_sampled=5, **kw),
        (3, 5),
        models.MoELanguageModel,
        dynamic_axes=(0, 1),
        float32_only=True,
        integer_inputs=True,
        takes_nothing=False,
    ),
    Descriptor(
        "MoELanguageModel",
        _language_model,
        (3, 5),
        models.MoELanguageModel,
        dynamic_axes=(0, 1),
        float32_only=True,
        integer_inputs=True,
        # keras.layers.LSTM itself fails on an empty batch (Keras 3.15).
        takes_nothing=False,
    ),
    Descriptor(
        "MultiplicativeAttention",
        lambda **kw: ToItself(layers.MultiplicativeAttention(3, **kw), **kw),
        (3, 5, 4),
        layers.MultiplicativeAttention,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "AttentionLSTM",
        lambda **kw: ToItself(
            layers.AttentionLSTM(keras.layers.LSTMCell(6, dtype=kw.get("dtype")), **kw),
            **kw,
        ),
        (3, 5, 4),
        layers.AttentionLSTM,
        dynamic_axes=(0, 1),
        # keras.layers.LSTMCell itself fails on an empty batch (Keras 3.15).
        takes_nothing=False,
    ),
    Descriptor(
        "CachedAttention",
        lambda **kw: layers.CachedAttention(4, 2, max_wavelength=100.0, **kw),
        (3, 5, 8),
        layers.CachedAttention,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoETransformerBlock",
        lambda **kw: layers.MoETransformerBlock(
            4,
            _moe(_random_gate)(dtype=kw.get("dtype")),
            causal=True,
            num_key_value_heads=2,
            max_wavelength=100.0,
            dropout=0.1,
            **kw,
        ),
        (3, 5, 8),
        layers.MoETransformerBlock,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoETransformerBlock, dense with an encoder, post-norm",
        lambda **kw: ToItself(
            layers.MoETransformerBlock(
                keras.layers.MultiHeadAttention(2, key_dim=3, dtype=kw.get("dtype")),
                feed_forward=6,
                normalize_first=False,
                **kw,
            ),
            **kw,
        ),
        (3, 5, 4),
        layers.MoETransformerBlock,
        dynamic_axes=(0, 1),
    ),
    Descriptor(
        "MoETransformerLanguageModel",
        lambda **kw: models.MoETransformerLanguageModel(
            20,
            [
                layers.MoETransformerBlock(
                    2,
                    moe,
                    causal=True,
                    max_wavelength=100.0,
                    dtype=kw.get("dtype"),
                )
                for moe in (None, _moe(_random_gate)(dtype=kw.get("dtype")))
            ],
            units=8,
            learned_positions=True,
            tied=True,
            dropout=0.1,
            **kw,
        ),
        (3, 5),
        models.MoETransformerLanguageModel,
        dynamic_axes=(0, 1),
        float32_only=True,
        integer_inputs=True,
    ),
    Descriptor(
        "MoETranslator",
        lambda **kw: ToItself(_translator(**kw), **kw),
        (3, 5),
        models.MoETranslator,
        dynamic_axes=(0, 1),
        float32_only=True,
        integer_inputs=True,
        takes_nothing=False,
        result=lambda logits: logits[..., 1:],  # that of padding is -1e9
    ),
]
