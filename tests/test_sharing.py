"""Layers that mixtures share stay shared, and gates learn their size."""

import json
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import functional, layers, models

FEATURES = 4


@keras.saving.register_keras_serializable("sharing")
class LearnedGate(keras.layers.Layer):
    """As in the guide on own gates, with a weight."""

    num_experts = None

    def build(self, shape):
        self.kernel = self.add_weight(
            name="kernel", shape=(shape[-1], self.num_experts)
        )

    def call(self, inputs, mask=None, training=None):
        gates, chosen = functional.top_k_gating(inputs @ self.kernel, 1)
        return functional.make_gating_result(gates, chosen, self.num_experts, mask=mask)


def experts(count=4):
    return layers.FeedForwardExperts(count, 3)


def gate(k=2):
    return layers.NoisyTopKGating(k, gate_initializer="glorot_normal")


def own_gate(inputs):
    return layers.MoE(experts(), LearnedGate())(inputs)


def own_primary_gate(inputs):
    return layers.HierarchicalMoE(experts(), 2, k=(1, 2), primary_gating=LearnedGate())(
        inputs
    )


def own_gate_of_two_levels(inputs):
    gating = layers.HierarchicalGating(2, (1, 2), primary_gating=LearnedGate())
    return layers.MoE(experts(), gating)(inputs)


def own_gate_of_lstm(inputs):
    sequences = keras.layers.Reshape((2, FEATURES // 2))(inputs)
    return layers.MoELSTM(3, 4, LearnedGate())(sequences)


def shared_experts(inputs):
    both = experts()
    return [layers.MoE(both, gate())(inputs) for _ in range(2)]


def shared_expert_list(inputs):
    both = layers.ExpertList([keras.layers.Dense(3) for _ in range(4)])
    return [layers.MoE(both, gate())(inputs) for _ in range(3)]


def shared_expert(inputs):
    both = keras.layers.Dense(3)
    lists = [layers.ExpertList([both, keras.layers.Dense(3)]) for _ in range(2)]
    return [layers.MoE(each, gate())(inputs) for each in lists]


def shared_gate(inputs):
    both = gate()
    return [layers.MoE(experts(), both)(inputs) for _ in range(2)]


def shared_own_gate(inputs):
    both = LearnedGate()
    return [layers.MoE(experts(), both)(inputs) for _ in range(2)]


def shared_primary_gate(inputs):
    both, own = gate(1), experts()
    return [
        layers.HierarchicalMoE(own, 2, k=(1, 2), primary_gating=both)(inputs)
        for _ in range(2)
    ]


def shared_flat_and_hierarchical(inputs):
    both = experts()
    flat = layers.MoE(both, gate())(inputs)
    return flat, layers.HierarchicalMoE(both, 2, k=(1, 2))(inputs)


@keras.saving.register_keras_serializable("sharing")
class Recommender(keras.layers.Layer):
    """Two mixtures of one pool of experts."""

    def __init__(self, tasks, **kwargs):
        super().__init__(**kwargs)
        self.first, self.second = tasks

    @property
    def tasks(self):
        return self.first, self.second

    def build(self, shape):
        for task in self.tasks:
            if not task.built:
                task.build(shape)

    def call(self, inputs):
        return [task(inputs) for task in self.tasks]

    def compute_output_shape(self, shape):
        return [task.compute_output_shape(shape) for task in self.tasks]

    def get_config(self):
        tasks = [keras.saving.serialize_keras_object(task) for task in self.tasks]
        return {**super().get_config(), "tasks": tasks}

    @classmethod
    def from_config(cls, config):
        tasks = [keras.saving.deserialize_keras_object(t) for t in config["tasks"]]
        return cls(**{**config, "tasks": tasks})


def shared_within_a_layer(inputs):
    both = experts()
    # Of one name, as nothing forbids it here.
    return Recommender([layers.MoE(both, gate(), name="task") for _ in range(2)])(
        inputs
    )


def apart_with_equal_names(inputs):
    return Recommender(
        [
            layers.MoE(layers.FeedForwardExperts(4, 3, name="experts"), gate(), name=n)
            for n in "ab"
        ]
    )(inputs)


CASES = [
    own_gate,
    own_primary_gate,
    own_gate_of_two_levels,
    own_gate_of_lstm,
    shared_experts,
    shared_expert_list,
    shared_expert,
    shared_gate,
    shared_own_gate,
    shared_primary_gate,
    shared_flat_and_hierarchical,
    shared_within_a_layer,
    apart_with_equal_names,
]


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def model(request):
    inputs = keras.Input((FEATURES,))
    return keras.Model(inputs, request.param(inputs))


def outputs_of(model):
    inputs = np.random.default_rng(0).normal(size=(6, FEATURES)).astype("float32")
    return [np.asarray(output) for output in keras.tree.flatten(model(inputs))]


def assert_alike(copy, model):
    assert len(copy.weights) == len(model.weights)
    assert not {id(v) for v in copy.weights} & {id(v) for v in model.weights}
    copy.set_weights(model.get_weights())
    for a, b in zip(outputs_of(copy), outputs_of(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_keras_file_keeps_what_is_shared(model, tmp_path):
    path = tmp_path / "model.keras"
    model.save(path)
    for _ in range(2):
        loaded = keras.saving.load_model(path)
        for a, b in zip(outputs_of(loaded), outputs_of(model), strict=True):
            np.testing.assert_array_equal(a, b)
        assert_alike(loaded, model)


def test_copies_keep_what_is_shared_and_share_nothing_with_each_other(model):
    copies = [
        keras.models.clone_model(model),
        keras.models.clone_model(model),
        keras.Model.from_config(model.get_config()),
        keras.Model.from_config(model.get_config()),
        keras.models.model_from_json(model.to_json()),
    ]
    for copy in copies:
        assert_alike(copy, model)
    names = [id(v) for each in (model, *copies) for v in each.weights]
    assert len(set(names)) == len(names)


def test_weights_file_and_checkpoint_of_shared_layers(model, tmp_path):
    copy = keras.models.clone_model(model)
    for variable in model.weights:
        variable.assign(variable + 0.1)
    model.save_weights(tmp_path / "model.weights.h5")
    copy.load_weights(tmp_path / "model.weights.h5")
    assert_alike(copy, model)
    copy = keras.models.clone_model(model)
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(model=copy).read(path).assert_consumed()
    for a, b in zip(outputs_of(copy), outputs_of(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_keras_file_of_a_gate_that_is_also_called_by_itself(tmp_path):
    inputs, both = keras.Input((FEATURES,)), gate()
    outputs = [layers.MoE(experts(), both)(inputs) for _ in range(2)]
    model = keras.Model(inputs, [*outputs, both(inputs).gates])
    model.save(tmp_path / "model.keras")
    assert_alike(keras.saving.load_model(tmp_path / "model.keras"), model)


def test_language_model_with_one_mixture_twice(tmp_path):
    moe = layers.MoE(layers.FeedForwardExperts(4, 3), gate())
    model = models.MoELanguageModel(10, FEATURES, middle=[moe, moe])
    model.build((None, None))
    copy = models.MoELanguageModel.from_config(model.get_config())
    copy.build((None, None))
    assert len(copy.weights) == len(model.weights)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_file_of_0_1_0_whose_second_mixture_alone_names_what_is_shared(tmp_path):
    inputs = keras.Input((FEATURES,))
    model = keras.Model(inputs, shared_experts(inputs))
    model.save(tmp_path / "new.keras")
    with zipfile.ZipFile(tmp_path / "new.keras") as new:
        files = {name: new.read(name) for name in new.namelist()}
    config = json.loads(files["config.json"])
    moes = [each for each in config["config"]["layers"] if each["class_name"] == "MoE"]
    for moe in moes:  # as that version wrote it
        del moe["config"]["gating"]["shared_object_id"]
    del moes[0]["config"]["experts"]["shared_object_id"]
    files["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as old:
        for name, data in files.items():
            old.writestr(name, data)
    loaded = keras.saving.load_model(tmp_path / "old.keras")
    for a, b in zip(outputs_of(loaded), outputs_of(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_experts_that_share_a_layer_inside_are_refused_when_saved(tmp_path):
    shared = keras.layers.Dense(3)
    parts = [keras.Sequential([shared, keras.layers.Dense(4)]) for _ in range(2)]
    moe = layers.MoE(layers.ExpertList(parts), gate())
    model = keras.Sequential([keras.Input((FEATURES,)), moe])
    with pytest.raises(ValueError, match=rf"`experts`.*share.*{shared.name}"):
        model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
