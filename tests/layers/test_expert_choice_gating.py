import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe.functional as F
from keras_moe import layers, models
from tests.helpers import assert_value_and_gradients
from tests.oracles import mixture as dense_oracle
from tests.oracles import routers as oracle

D, E, H = 4, 6, 5


def make_moe(**kwargs):
    experts = layers.FeedForwardExperts(E, H, dtype=kwargs.get("dtype"))
    gating = layers.ExpertChoiceGating(dtype=kwargs.get("dtype"))
    layer = layers.MoE(experts, gating, **kwargs)
    layer.build((None, D))
    return layer


def tokens(rng, n):
    return rng.normal(size=(n, D)).astype("float32")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "factor", "capacity"),
    # factor N / E: 24/6 = 4; 14/6 = 2.33; 2/6; 1.25 * 9 / 6 = 1.9; 7, all.
    [(12, 2.0, 4), (7, 2.0, 3), (1, 2.0, 1), (9, 1.25, 2), (7, 9.0, 7), (0, 2.0, 0)],
)
def test_every_expert_takes_as_many_tokens(rng, num_tokens, factor, capacity, training):
    gate = layers.ExpertChoiceGating(factor, E)
    result = gate(tokens(rng, num_tokens), training=training)
    assert result.statistics.counts.numpy().tolist() == [capacity] * E
    assert F.make_plan(result).counts.numpy().tolist() == [capacity] * E
    assert (np.diff(result.token_indices) >= 0).all()
    if num_tokens:
        assert capacity == oracle.expert_choice_capacity(num_tokens, E, factor)


def test_moe_equals_dense_enumeration_in_value_and_gradients(rng):
    layer = make_moe(dtype="float64")
    x = rng.normal(size=(10, D))
    kernels = [v.numpy() for v in layer.experts.trainable_variables]

    def outputs(x, gate_kernel, *kernels):
        values = [gate_kernel, *kernels]
        own = [layer.gating.gate_kernel, *layer.experts.trainable_variables]
        with keras.StatelessScope(state_mapping=list(zip(own, values, strict=True))):
            return layer(x, training=True)

    assert_value_and_gradients(
        outputs,
        lambda x, w, *kernels: dense_oracle.mixture(
            x, oracle.expert_choice(x @ w, 4), kernels
        ),
        [x, layer.gating.gate_kernel.numpy(), *kernels],
    )


def test_padding_is_never_chosen_and_not_counted(rng):
    x = rng.normal(size=(3, 6, D)).astype("float32")
    mask = np.arange(6) < np.array([[6], [3], [0]])
    x[~mask] *= 100.0  # would win every place
    layer = make_moe()
    outputs = layer(x, mask=mask, training=True).numpy()
    np.testing.assert_array_equal(outputs[~mask], 0.0)
    np.testing.assert_allclose(outputs[mask], layer(x[mask]), rtol=1e-5, atol=1e-6)
    # Handed to the gate itself, which then sees padding: 2 * 9 / 6 of the real ones.
    flat, real = x.reshape(-1, D), mask.reshape(-1)
    result = layer.gating(flat, mask=real)
    assert result.statistics.counts.numpy().tolist() == [3] * E
    assert real[result.token_indices].all()


def test_no_loss_unless_asked_for(rng):
    layer = make_moe()
    layer(tokens(rng, 9), training=True)
    assert layer.losses == []
    layer = make_moe(importance_loss_weight=0.1)
    layer(tokens(rng, 9), training=True)
    assert len(layer.losses) == 1


def test_fit_shows_equal_loads_and_learns(rng):
    model = keras.Sequential([keras.Input((3, D)), make_moe(name="moe")])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = rng.normal(size=(24, 3, D)).astype("float32")
    before = model.get_layer("moe").gating.gate_kernel.numpy()
    history = model.fit(x, np.sin(x), batch_size=8, epochs=3, verbose=0).history
    assert history["moe_load_cv"] == [0.0] * 3
    assert history["loss"][-1] < history["loss"][0]
    moved = model.get_layer("moe").gating.gate_kernel.numpy() - before
    assert np.abs(moved).max() > 1e-5


def test_a_capacity_of_the_mixture_is_refused(rng):
    layer = make_moe(capacity_factor=1.0)
    with pytest.raises(ValueError, match=r"capacity_factor=1.0 with ExpertChoiceGat"):
        layer(tokens(rng, 5))


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "2", None])
def test_refuses_a_factor_that_is_no_positive_number(factor):
    with pytest.raises(ValueError, match="`capacity_factor` must be"):
        layers.ExpertChoiceGating(factor)


def groups(gate):
    return layers.HierarchicalMoE(
        layers.FeedForwardExperts(8, H), 4, primary_gating=gate, name="groups"
    )


def translator(place, mixture):
    other = layers.MoE(layers.FeedForwardExperts(4, H), layers.TopKGating(2), name="o")
    names = {"encoder": "decoder", "decoder": "encoder"}
    middle = {f"{place}_middle": mixture, f"{names[place]}_middle": other}
    return models.MoETranslator(20, D, **middle)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.MoELanguageModel(20, D, middle=make_moe()),
        lambda: models.MoELanguageModel(
            20, D, middle=keras.Sequential([groups(layers.ExpertChoiceGating())])
        ),
        lambda: layers.MoELSTM(4, E, layers.ExpertChoiceGating()),
        lambda: layers.MoELSTMCell(4, E, layers.ExpertChoiceGating()),
        lambda: translator("decoder", make_moe()),
    ],
    ids=["language model", "as groups", "MoELSTM", "MoELSTMCell", "decoder"],
)
def test_where_a_token_must_not_see_later_ones_it_is_refused(make):
    with pytest.raises(ValueError, match="later tokens.*ExpertChoiceGating"):
        make()


def test_an_encoder_takes_it():
    model = translator("encoder", make_moe())
    source = np.array([[3, 4, 2, 0], [5, 2, 0, 0]], "int32")
    logits = model((source, source), training=True)
    assert np.isfinite(logits).all()
    counts = model.encoder_middle[0].balance.counts().numpy()
    assert counts.tolist() == [2.0] * E  # 2 * 5 / 6 of the tokens that are no padding


def test_in_static_shapes_experts_have_slots_for_their_tokens_only():
    gate = layers.ExpertChoiceGating(1.0, 64)
    x = tf.random.normal((512, D))

    @tf.function(jit_compile=True)
    def slots(x):
        result = gate(x)
        plan = F.StaticDispatcher(gate.k).make_plan(result, None)
        return plan.counts, tf.shape(plan.token_indices)

    counts, shape = slots(x)
    assert counts.numpy().tolist() == [8] * 64
    # 1.25 times 8, rounded up to a multiple of 8; not 1.25 times 512.
    assert shape.numpy().tolist() == [64, 16]
