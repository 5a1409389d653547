"""Careless arguments: refused by name, or answered as the careful ones are.

Each parameter below has a domain, of which values are drawn, and others just outside
of it. A call with all arguments inside gives what it gives with plain Python numbers
and float32 or int32 tensors; one argument outside makes it raise an error that names
that argument. Nothing may be answered in silence.
"""

import contextlib
import dataclasses
import shutil
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import data, layers, models, optimizers, planning, telemetry
from keras_moe import functional as F

SEED = 20
CASES = 600


class Int:
    """Whole numbers from `least` to `most`."""

    outside = (None, 2.5, float("nan"), float("inf"), "2", True, [2], 10**30)

    def __init__(self, least, most, *, optional=False):
        self.least, self.most, self.optional = least, most, optional

    def inside(self, rng):
        plain = int(rng.integers(self.least, self.most + 1))
        kind = rng.choice([int, np.int64, np.int32, np.array, tf.constant])
        return plain, kind(plain)

    def other(self, rng):
        choices = [self.least - 1, self.least - 7, *self.outside[self.optional :]]
        return choices[rng.integers(len(choices))]


class Number:
    """Numbers from `least` to `most`, both inside."""

    outside = (None, float("nan"), float("inf"), -float("inf"), "1", True, [0.5, 0.5])

    def __init__(self, least, most):
        self.least, self.most = least, most

    def inside(self, rng):
        plain = float(rng.choice([self.least, self.most, (self.least + self.most) / 2]))
        kind = rng.choice([float, np.float64, np.array])
        return plain, kind(plain)

    def other(self, rng):
        choices = [self.least - 1e-3, self.least - 10, *self.outside]
        return choices[rng.integers(len(choices))]


class Array:
    """Arrays of a shape, by a function of it."""

    kinds = (np.asarray, tf.constant, np.ndarray.tolist)

    def __init__(self, *shape, free=()):
        self.shape, self.free = shape, free  # axes that may have another length

    def draw(self, rng, shape):
        return rng.uniform(0.1, 0.9, size=shape).astype("float32")

    def inside(self, rng):
        plain = self.draw(rng, self.shape)
        return tf.constant(plain), self.kinds[rng.integers(len(self.kinds))](plain)

    def shapes(self):
        """What could be broadcast or reshaped: one entry, fewer, turned round."""
        for axis, size in enumerate(self.shape):
            if axis in self.free:
                continue
            for other in {1, size - 1, size + 1} - {size}:
                yield (*self.shape[:axis], other, *self.shape[axis + 1 :])
        if self.shape != self.shape[::-1] and not self.free:
            yield self.shape[::-1]

    def other(self, rng):
        shapes = list(self.shapes())
        return self.draw(rng, shapes[rng.integers(len(shapes))])


class Ids(Array):
    """Whole numbers from 0, below `size`."""

    kinds = (*Array.kinds, lambda x: x.astype("int64"))

    def __init__(self, *shape, size, shapes=True):
        super().__init__(*shape)
        self.size, self.shapes_too = size, shapes

    def draw(self, rng, shape):
        return rng.integers(0, self.size, size=shape).astype("int32")

    def other(self, rng):
        kind = rng.integers(4 if self.shapes_too else 3)
        if kind == 3:
            return super().other(rng)
        ids = self.draw(rng, self.shape)
        if kind == 0:
            return ids + 0.7
        ids.flat[rng.integers(ids.size)] = [None, self.size, -2][kind]
        return ids


class Mask(Array):
    """Bools."""

    def draw(self, rng, shape):
        return rng.random(shape) < 0.7

    def other(self, rng):
        if rng.random() < 0.3:
            return np.ones(self.shape, "int32")
        return super().other(rng)


class Of(Array):
    """One of some values; others are refused."""

    def __init__(self, inside, outside):
        self.values, self.others = inside, outside

    def inside(self, rng):
        value = self.values[rng.integers(len(self.values))]
        return value, value

    def other(self, rng):
        return self.others[rng.integers(len(self.others))]


def plan(rows=6):
    experts = np.arange(rows * 2, dtype="int32").reshape(rows, 2) % 4
    return F.make_dispatch_plan(experts, 4)


def preset(**changes):
    return models.Preset("x", **{"num_experts": 8, **changes})


def cluster(**changes):
    return planning.Cluster(
        **{
            "name": "x",
            "device": "d",
            "num_devices": 2,
            "memory_gb": 1,
            "teraflops": 1,
            "efficiency": 0.5,
            "memory_gb_per_second": 1,
            "network_gb_per_second": 1,
            **changes,
        }
    )


def beam_search(start, **options):
    def step(tokens, state):
        return tf.one_hot((tokens + 3) % 20, 20), state

    state = {"s": tf.zeros((2, 1))}
    options = {"vocabulary_size": 20, "eos_id": 2, "max_length": 4} | options
    return models.beam_search(step, start, state, **options)


def gate(kind, inputs, **options):
    keras.utils.set_random_seed(1)
    return getattr(layers, kind)(2, 4)(inputs, **options)


def experts(inputs, **options):
    keras.utils.set_random_seed(1)
    return layers.FeedForwardExperts(4, 8)(inputs, **options)


def lstm(inputs, **options):
    keras.utils.set_random_seed(1)
    gating = layers.TopKGating(2)
    return layers.MoELSTM(4, 4, gating)(inputs, **options)


def attention_lstm(inputs, memory, h=None, c=None, **options):
    keras.utils.set_random_seed(1)
    state = None if h is None else [tf.constant(h), tf.constant(c)]
    layer = layers.AttentionLSTM(keras.layers.LSTMCell(4))
    return layer(inputs, memory, initial_state=state, **options)[0]


def softmax(inputs, targets):
    keras.utils.set_random_seed(1)
    return layers.SampledSoftmax(20, 5)(inputs, targets=targets)


_LANGUAGE_MODEL = []


def language_model():
    if not _LANGUAGE_MODEL:
        keras.utils.set_random_seed(1)
        mixture = layers.MoE(layers.FeedForwardExperts(4, 8), layers.TopKGating(2))
        _LANGUAGE_MODEL.append(models.MoELanguageModel(20, 8, middle=mixture))
    return _LANGUAGE_MODEL[0]


def generate(prompt, max_new_tokens, **options):
    return language_model().generate(prompt, max_new_tokens, **{"seed": 1, **options})


def adam_step(**options):
    weight = keras.Variable(np.ones((2, 3, 4), "float32"))
    weight.is_expert_weight = True
    optimizer = optimizers.FactoredAdam(**options)
    optimizer.build([weight])
    optimizer.apply([tf.ones((2, 3, 4))])
    return weight.numpy()


def rate(step=3, **options):
    schedule = optimizers.WarmupInverseSquareRoot(
        **{"peak_learning_rate": 1.0, "warmup_steps": 2, **options}
    )
    return schedule(step)


def vocabulary():
    return data.Vocabulary.from_tokens([["a", "b", "c"], ["b", "a"]])


def steps(**options):
    ids = np.arange(40, dtype="int32") % 6
    corpus = data.TextCorpus("x", "words", vocabulary(), ids, ids, ids)
    return corpus.num_steps("test", **options)


def scores(**options):
    return telemetry.translation_scores(**{"language": "en", **options})


NDE = {"clean_logits": Array(6, 4), "stddev": Array(6, 4)}
TEXTS = Of([["a cat sat"], ("a dog",)], ["a cat sat", b"abc", [1.5]])
# The parameter of each is drawn from its domain; the bad ones of `Array` are shapes.
CALLS = {
    F.noisy_logits: {**NDE, "noise": Array(6, 4)},
    F.prob_in_top_k: {**NDE, "noisy_logits": Array(6, 4), "k": Int(1, 3)},
    F.noise_stddev: {
        "raw_noise": Of([np.ones((2, 3), "float32")], []),
        "noise_epsilon": Number(0, 2),
    },
    F.load: {
        "prob_in_top_k": Of([np.full((6, 4), 0.5, "float32")], []),
        "mask": Mask(6),
    },
    F.importance: {
        "gates": Array(6, 2),
        "expert_indices": Ids(6, 2, size=4),
        "num_experts": Of([4], [0, -1, 2.5]),
    },
    F.expert_counts: {
        "expert_indices": Ids(6, 2, size=4, shapes=False),
        "num_experts": Of([4, np.int64(4)], [0, -1, 2.5, True]),
    },
    F.cv_squared: {"values": Of([[1.0, 2.0], np.ones(3)], []), "epsilon": Number(0, 1)},
    F.importance_loss: {"importance": Of([[1.0, 2.0]], []), "weight": Number(0, 1)},
    F.biased_gating: {
        "logits": Array(6, 4, free=[0]),
        "bias": Array(4),
        "k": Int(1, 2),
        "scores": Of(["sigmoid", "softmax"], ["relu", None, 1]),
        "normalization": Of(["selected", "none"], ["all", None]),
        "num_groups": Of([1, 2, np.int64(2)], [3, 0, -1, 1.5, "2", True]),
    },
    F.expert_choice_capacity: {
        "num_tokens": Int(0, 50),
        "num_experts": Of([4, np.int64(9)], [0, -1, 2.5, True, "4"]),
        "capacity_factor": Number(1e-4, 3),
    },
    F.expert_choice_gating: {
        "logits": Of([np.eye(6, 4, dtype="float32")], [np.ones(4)]),
        "capacity": Int(0, 6),
        "mask": Mask(6),
    },
    F.second_choice_gating: {
        "logits": Of([np.eye(6, 4, dtype="float32")], [np.ones(4), np.ones((6, 1))]),
        "policy": Of(["all", "random", "threshold"], ["none", None, 1]),
        "uniform": Array(6),
        "threshold": Number(0, 1),
    },
    F.balanced_bias: {
        "bias": Array(4),
        "counts": Of([[1, 2, 3, 0]], [[1, 2], [[1, 2, 3, 4]]]),
        "update_rate": Number(0, 1),
    },
    F.router_z_loss: {
        "logits": Of([np.full((6, 4), 0.5, "float32")], [np.ones(4)]),
        "mask": Mask(6),
        "weight": Number(0, 1),
    },
    F.switch_loss: {
        "probabilities": Of([np.full((6, 4), 0.25, "float32")], [np.ones(4)]),
        "counts": Of([[1, 2, 3, 0]], [[-1, 2, 3, 2], [0.5, 1, 1, 1], [6], [1, 2, 3]]),
        "mask": Mask(6),
        "weight": Number(0, 1),
    },
    F.choices_kept: {
        "clean_logits": Of([np.full((6, 4), 0.5, "float32")], [np.ones(4)]),
        "expert_indices": Of([[[0, 2]] * 6], [[[0, 4]] * 6, [[0, -1]] * 6, [[0, 2]]]),
        "mask": Mask(6),
    },
    F.gate_entropy: {
        "gates": Of([np.full((6, 2), 0.5, "float32")], []),
        "num_tokens": Of([6, np.int64(6)], [-1, 6.5, "6", True]),
        "mask": Mask(6),
    },
    F.expert_capacity: {
        "num_tokens": Int(0, 50),
        "num_experts": Of([4, np.int64(9)], [0, -1, 2.5, True, "4"]),
        "k": Int(1, 4),
        "capacity_factor": Number(1e-4, 3),
    },
    F.tokens_per_expert: {
        "num_tokens": Int(0, 50),
        "num_experts": Of([4, np.int64(9)], [0, -1, 2.5, True, "4"]),
        "k": Int(1, 4),
    },
    F.make_gating_result: {
        "gates": Array(6, 2),
        "expert_indices": Ids(6, 2, size=4),
        "num_experts": Of([4], [0, "4"]),
        "load": Array(4),
        "mask": Mask(6),
    },
    F.make_dispatch_plan: {
        "expert_indices": Ids(6, 2, size=4, shapes=False),
        "num_experts": Of([4], [0, 4.0]),
    },
    F.make_capacity_plan: {
        "expert_indices": Ids(6, 2, size=4, shapes=False),
        "num_experts": Of([4], [0]),
        "capacity": Int(1, 6),
        "mask": Mask(6),
    },
    F.masked_gating: {"logits": Array(6, 4), "mask": Mask(6, 4)},
    F.hierarchical_load: {
        "primary_load": Array(2),
        "secondary_load": Array(2, 3, free=[1]),
        "group_counts": Of([[1, 2]], [[-1, 2], [0.5, 1], [1], [[1], [2]]]),
    },
    F.batchwise_mask: {
        "gates": Of([np.full((6, 4), 0.5, "float32")], [np.ones(4)]),
        "m": Int(0, 6),
    },
    F.cross_entropy: {"logits": Array(6, 4, free=[1]), "targets": Ids(6, size=4)},
    F.sampled_cross_entropy: {
        "inputs": Array(6, 3),
        "kernel": Array(9, 3),
        "bias": Array(9),
        "targets": Ids(6, size=9),
        "candidates": Ids(4, size=9),
        "expected_counts": Array(4),
    },
    F.normal_rows: {
        "seed": Of([[1, 2]], [[1.0, 2.0]]),
        "first_row": Int(0, 9),
        "num_rows": Int(0, 5),
        "width": Int(1, 5),
    },
    F.lstm_step: {"z": Array(3, 8), "c": Array(3, 2)},
    lambda gates: F.combine(np.ones((12, 3), "float32"), gates, plan()): {
        "gates": Array(6, 2)
    },
    lambda inputs, gates: experts(
        np.asarray(inputs), gates=np.asarray(gates), plan=plan()
    ): {"inputs": Array(6, 8, free=[1]), "gates": Array(6, 2)},
    lambda counts: experts(np.ones((6, 8), "float32"), counts=counts): {
        "counts": Of(
            [[1, 2, 2, 1], np.array([6, 0, 0, 0])],
            [[6, 0, 0], [7, -1, 0, 0], [1, 1, 1, 1], [1.5, 1.5, 2, 1]],
        )
    },
    lambda mask: gate("TopKGating", np.ones((6, 8), "float32"), mask=mask): {
        "mask": Mask(6)
    },
    lambda mask: gate("BalancedGating", np.ones((6, 8), "float32"), mask=mask): {
        "mask": Mask(6)
    },
    lambda noise: gate(
        "NoisyTopKGating", np.ones((6, 8), "float32"), noise=noise, training=True
    ): {"noise": Array(6, 4)},
    lambda mask: lstm(np.ones((2, 5, 8), "float32"), mask=np.asarray(mask)): {
        "mask": Of(
            [np.ones((2, 5), bool)], [np.ones((1, 5), bool), np.ones((2, 1), bool)]
        )
    },
    lambda memory_mask, h, c: attention_lstm(
        np.ones((2, 3, 8), "float32"),
        np.ones((2, 5, 4), "float32"),
        h,
        c,
        memory_mask=np.asarray(memory_mask),
    ): {
        "memory_mask": Of(
            [np.ones((2, 5), bool)], [np.ones((2, 1), bool), np.ones((1, 5), bool)]
        ),
        "h": Array(2, 4),
        "c": Array(2, 4),
    },
    lambda targets: softmax(np.ones((2, 5, 8), "float32"), targets): {
        "targets": Ids(2, 5, size=20)
    },
    models.sample_tokens: {
        "logits": Array(3, 5, free=[1]),
        "uniform": Array(3),
        "temperature": Number(0, 2),
        "top_k": Int(1, 5, optional=True),
        "forbidden_tokens": Of(
            [(), [0], np.array([1, 2])], [(5,), (-1,), range(5), (0.5,), "1", 2]
        ),
    },
    generate: {
        "prompt": Ids(2, 3, size=20, shapes=False),
        "max_new_tokens": Int(1, 2),
        "temperature": Number(0, 2),
        "top_k": Int(1, 9, optional=True),
        "seed": Of([3, np.int64(4)], [1.5, "1", True, 2**70]),
    },
    beam_search: {
        "start": Ids(2, size=20),
        "num_beams": Int(1, 3),
        "eos_id": Int(0, 19),
        "length_penalty": Number(0, 2),
        "max_length": Int(1, 4),
    },
    preset: {
        "units": Int(1, 9),
        "num_experts": Of([4, np.int64(9)], [0, -1, 2.5, True, "4"]),
        "hidden_units": Int(1, 9),
        "k": Of([(4,), np.array([2])], [(10,), (2, 2), (0,), (1.5,), "4"]),
        "dropout": Number(0, 0.9),
        "batch_tokens": Int(1, 9),
        "gating": Of(["balanced"], ["nope", None]),
        "middle": Of(["moe"], ["MoE", 1]),
    },
    cluster: {
        "num_devices": Int(1, 9, optional=True),
        "memory_gb": Number(1e-4, 9),
        "efficiency": Number(1e-4, 1),
        "devices_per_node": Int(1, 9),
        "network_gb_per_second": Number(1e-4, 9),
        "launch_microseconds": Number(0, 9),
    },
    lambda **options: planning.plan("moe_256", **options).step_time: {
        "num_devices": Int(1, 9, optional=True),
        "batch_tokens": Int(1, 900, optional=True),
        "imbalance": Number(1, 3),
    },
    adam_step: {
        "learning_rate": Number(0, 1),
        "beta_1": Number(0, 0.9),
        "beta_2": Number(0, 0.9),
        "epsilon": Number(1e-4, 1),
    },
    rate: {
        "peak_learning_rate": Number(0, 1),
        "warmup_steps": Int(1, 9),
        "constant_steps": Int(0, 9),
    },
    lambda ids: vocabulary().decode(ids): {"ids": Ids(4, size=6, shapes=False)},
    lambda tokens: vocabulary().encode(tokens): {
        "tokens": Of([["a", "x"], ("b",)], ["ab", [1.5], [b"a"]])
    },
    steps: {"batch_size": Int(1, 9), "sequence_length": Int(1, 9)},
    telemetry.mutual_information: {
        "counts": Of(
            [[[1, 2], [3, 4]]],
            [[[np.inf, 1]], [[-1, 2]], [[0, 0]], [1, 2], [[np.nan, 1]]],
        )
    },
    scores: {"hypotheses": TEXTS, "references": TEXTS},
}
CALLS = [
    (getattr(call, "__name__", "call"), call, domains)
    for call, domains in CALLS.items()
]


def numbers(answer):
    """All numbers in an answer."""
    if dataclasses.is_dataclass(answer):
        answer = dataclasses.asdict(answer)
    flat = tf.nest.flatten(answer)
    return [np.asarray(x) for x in flat if not isinstance(x, str | type(None))]


def complaint(call, arguments):
    """Why a call is answered wrongly, or None."""
    try:
        call(**arguments)
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        text = str(error)
        if isinstance(error, TypeError):
            return None  # a wholly wrong type
        if (
            isinstance(error, ValueError)
            and "Received" in text
            and any(f"`{name}`" in text for name in arguments)
        ):
            return None
        return f"{type(error).__name__}: {text[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "answered in silence"


@pytest.mark.parametrize("part", range(6))
def test_arguments_inside_and_just_outside_of_their_domains(part):
    rng = np.random.default_rng([SEED, part])
    wrong = []
    for case in range(CASES // 6):
        name, call, domains = CALLS[(part + 6 * case) % len(CALLS)]
        drawn = {key: domain.inside(rng) for key, domain in domains.items()}
        careful = {key: plain for key, (plain, _) in drawn.items()}
        careless = {key: value for key, (_, value) in drawn.items()}
        if case % 4 == 0:
            expected, found = numbers(call(**careful)), numbers(call(**careless))
            for a, b in zip(expected, found, strict=True):
                if a.dtype.kind in "fiub":
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            continue
        open_to = [k for k, d in domains.items() if getattr(d, "others", 1) != []]
        key = open_to[rng.integers(len(open_to))]
        outside = {**careless, key: domains[key].other(rng)}
        problem = complaint(call, outside)
        if problem is not None:
            wrong.append((name, key, repr(outside[key])[:80], problem))
    assert not wrong, "\n".join(map(str, wrong))


class Plain(keras.layers.Layer):
    """A gate that gives a tensor."""

    def call(self, inputs, mask=None, training=None):
        return inputs


OTHERS = {
    "gating": lambda: layers.MoE(layers.FeedForwardExperts(4, 8), Plain())(
        np.ones((6, 8), "float32")
    ),
    "experts": lambda: layers.ExpertList(keras.layers.Dense(8)),
    "inputs": lambda: layers.TopKGating(2, 4)(np.ones((6, 8), "int32")),
    "num_experts": lambda: layers.TopKGating(1, "4"),
    "capacity_factor": lambda: layers.MoE(
        layers.FeedForwardExperts(4, 8), capacity_factor="1.5"
    ),
    "seed": lambda: layers.NoisyTopKGating(2, seed=1.5),
    "hidden_units": lambda: layers.FeedForwardExperts(4, "88"),
    "name": lambda: models.count("moe_256_h_no"),
    "tokens": lambda: planning.memory_of(
        models.preset("moe_256"), planning.place(models.preset("moe_256"), 4, True), -1
    ),
    "num_devices": lambda: planning.place("moe_256", 2.5, False),
    "directions": lambda: data.load_translation_corpus(directions="en-fr"),
    "sequence_length": lambda: steps(batch_size=2, sequence_length=2**30),
    "epsilon": lambda: optimizers.FactoredAdam(epsilon=0),
    "clipnorm": lambda: optimizers.FactoredAdam(clipnorm=-1.0),
    "constant_steps": lambda: optimizers.WarmupInverseSquareRoot(1.0, 2, 2.7),
    "lstm_layers": lambda: models.MoELanguageModel(20, 8, lstm_layers=3),
    "middle_after": lambda: models.MoETranslator(20, 8, middle_after=(1.5, 1)),
    "state": lambda: language_model().call_with_state(
        np.ones((2, 5), "int32"), language_model().initial_state(1)
    ),
    "texts": lambda: data.SubwordVocabulary.learn("abc", 300, ["fr"]),
    "languages": lambda: data.SubwordVocabulary.learn(["abc"], 300, "fr"),
    "kernels": lambda: F.feed_forward_experts(
        np.ones((4, 2, 3), "float32"), [np.ones((1, 3, 3), "float32")]
    ),
    "query": lambda: layers.MultiplicativeAttention()(
        np.ones((1, 3, 4), "float32"), np.ones((2, 5, 4), "float32")
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_is_refused(name):
    with pytest.raises(ValueError, match=r"Received"):
        OTHERS[name]()


def test_a_direction_from_a_language_into_itself_is_refused():
    with pytest.raises(ValueError, match="two different language names.*'en-en'"):
        data.load_translation_corpus(directions=["en-en"])


def test_numbers_and_arrays_of_numpy_are_saved_with_a_layer():
    layer = layers.HierarchicalMoE(
        layers.FeedForwardExperts(np.int64(8), np.array([8, 4])), 4, k=np.array([2, 1])
    )
    gate = layers.NoisyTopKGating(np.int64(2), seed=np.int64(3))
    for each in (layer, gate):
        text = keras.saving.serialize_keras_object(each)
        copy = keras.saving.deserialize_keras_object(text)
        assert copy.get_config() == each.get_config()
    assert layer.experts.hidden_units == [8, 4]
    assert type(gate.seed) is int


def test_wrong_shapes_are_seen_when_a_graph_is_made():
    gating = layers.NoisyTopKGating(2, 4)
    gating.build((None, 8))

    @tf.function
    def run(inputs, mask):
        return gating(inputs, mask=mask).gates

    with pytest.raises(ValueError, match="`mask` must have the shape"):
        run(tf.ones((6, 8)), tf.ones(1, tf.bool))
    # Unknown ones pass, and add nothing to the graph.
    rows = tf.TensorSpec((None, 8)), tf.TensorSpec((None,), tf.bool)
    names = {
        node.type for node in run.get_concrete_function(*rows).graph.get_operations()
    }
    assert "Assert" not in names


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    mixture = layers.MoE(layers.FeedForwardExperts(4, 8), layers.TopKGating(2))
    model = keras.Sequential([keras.Input((8,)), mixture])
    model.save(path)
    return model, path


def test_damaged_files_are_refused_or_whole(saved, tmp_path):
    model, path = saved
    whole, inputs = path.read_bytes(), np.ones((3, 8), "float32")
    rng = np.random.default_rng(SEED)
    refused = 0
    for case in range(24):
        damaged = bytearray(whole)
        place = int(rng.integers(len(whole)))
        if case % 2:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << int(rng.integers(8))
        file = tmp_path / f"{case}.keras"
        file.write_bytes(damaged)
        try:
            loaded = keras.models.load_model(file)
        except Exception:
            refused += 1
        else:  # a byte that says nothing, such as a date
            np.testing.assert_array_equal(loaded(inputs), model(inputs))
    assert refused >= 12  # all that were cut


def test_a_file_with_a_member_outside_of_its_folder_writes_nothing_there(
    saved, tmp_path
):
    _, path = saved
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    file = shutil.copy(path, inner / "model.keras")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../../outside.txt", "x")
        archive.writestr(str(tmp_path / "absolute.txt"), "x")
    with contextlib.suppress(ValueError):
        keras.models.load_model(file)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "model.keras"]
