"""Checks what the comparison with other packages says about their behavior.

    pip install tf-models-official keras-hub
    python examples/comparison/check_packages.py

Every line that it prints is a finding of this run, not a quotation. Cells of
`docs/comparison.md` that say "read" instead come from the packages' source.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import importlib.metadata
import tempfile
from pathlib import Path

import keras
import numpy as np
import tf_keras

import keras_moe

BATCH, LENGTH, FEATURES, EXPERTS, K = 2, 8, 16, 4, 2


def make_inputs():
    """A batch, and one that agrees with it in the first token of each row only."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, BATCH, LENGTH, FEATURES)).astype("float32")
    other[:, 0] = one[:, 0]
    return one, other


def attempt(action):
    """What an action gives, or the first line of its error."""
    try:
        return action()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(lines)[:110]}"


def depends_on_mates(layer):
    """Whether the first token's output changes with the rest of its sequence."""
    one, other = make_inputs()
    difference = np.abs(layer(one)[:, 0] - layer(other)[:, 0]).max()
    return bool(difference > 1e-6)


def num_left_out(layer):
    """How many of 1,024 tokens no expert has answered."""
    tokens = np.random.default_rng(1).normal(size=(128, LENGTH, FEATURES))
    outputs = np.array(layer(tokens.astype("float32")))
    return int((np.abs(outputs).max(axis=-1) == 0).sum())


def round_trip(make_layer, module):
    """Saves a model of the layer as `.keras` and loads it."""
    inputs = module.Input((LENGTH, FEATURES))
    model = module.Model(inputs, make_layer()(inputs))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        again = module.models.load_model(path)
    one, _ = make_inputs()
    return bool(np.allclose(model(one), again(one), atol=1e-6))


def free_length(make_layer, module):
    """Shape of a symbolic call with an unknown sequence length."""
    return tuple(make_layer()(module.Input((None, FEATURES))).shape)


def make_here():
    return keras_moe.layers.MoE(
        keras_moe.layers.FeedForwardExperts(EXPERTS, hidden_units=32),
        keras_moe.layers.NoisyTopKGating(K, gate_initializer="glorot_uniform"),
    )


def make_official():
    from official.nlp.modeling.layers import moe

    return moe.MoeLayer(
        moe.FeedForwardExperts(EXPERTS, 32),
        moe.ExpertsChooseMaskedRouter(EXPERTS),
        train_capacity_factor=float(K),
        eval_capacity_factor=float(K),
    )


@keras.saving.register_keras_serializable(package="comparison")
class HubLayer(keras.layers.Layer):
    """The mixture of keras-hub's Mixtral without the router logits it returns."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        from keras_hub.src.models.mixtral import mixtral_decoder

        self.block = mixtral_decoder.MixtralSparseMoeBlock(FEATURES, 32, EXPERTS, K)

    def build(self, input_shape):
        self.block.build(input_shape)

    def call(self, inputs):
        return self.block(inputs)[0]


def report(name, make_layer, module):
    print(f"\n{name} {importlib.metadata.version(name)}")
    layer = make_layer()
    layer(make_inputs()[0])
    print(f"  is a layer of Keras 3: {isinstance(layer, keras.layers.Layer)}")
    print(f"  a token's output depends on its sequence: {depends_on_mates(layer)}")
    print(f"  tokens with an output of zero: {num_left_out(layer)} of 1024")
    free = attempt(lambda: free_length(make_layer, module))
    print(f"  sequence of unknown length: {free}")
    print(f"  .keras round trip: {attempt(lambda: round_trip(make_layer, module))}")


def report_hub_api():
    import keras_hub

    shown = [n for n in dir(keras_hub.layers) if "moe" in n.lower() or "xpert" in n]
    print(f"  mixtures in keras_hub.layers: {shown}")
    backbone = keras_hub.models.MixtralBackbone(
        vocabulary_size=20,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=32,
        num_experts=EXPERTS,
        top_k=K,
    )
    inputs = {name: np.ones((1, 5), "int32") for name in ("token_ids", "padding_mask")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        backbone.save(path)
        again = keras.models.load_model(path)
    same = np.allclose(backbone(inputs), again(inputs), atol=1e-6)
    print(f"  .keras round trip of MixtralBackbone: {bool(same)}")


def main():
    report("keras-moe", make_here, keras)
    report("tf-models-official", make_official, tf_keras)
    report("keras-hub", HubLayer, keras)
    report_hub_api()


if __name__ == "__main__":
    main()
