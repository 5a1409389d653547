"""Whatever Keras' own export takes is exported, by the names that it has there."""

from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe
from examples.serving.c_api_child import Child
from keras_moe import layers
from keras_moe.serving.structure import unique_names

U = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
V = np.random.default_rng(1).normal(size=(3, 4)).astype("float32")
WORDS = tf.constant(["a b", "c z a", ""])
CASES: dict[str, Callable] = {}


def case(make):
    CASES[make.__name__] = make
    return make


def mixture(x, name=None):
    gating = layers.NoisyTopKGating(k=2, gate_initializer="glorot_normal")
    return layers.MoE(layers.FeedForwardExperts(4, 8), gating, name=name)(x)


def named(name, shape=(4,), **options):
    return keras.Input(shape, name=name, **options)


# Each case: a model, what it is called with, the same by name, names of the outputs
# in the order of `keras.tree.flatten`.


@case
def lookups_at_every_depth():
    vectorize = keras.layers.TextVectorization(output_sequence_length=3)
    vectorize.adapt(["a b c", "b a"])
    inner = keras.Sequential([vectorize, keras.layers.Embedding(9, 4)])
    word, number = named("word", (), dtype="string"), named("n", (1,), dtype="int64")
    crossed = keras.layers.Hashing(4)(number)
    # `Flatten` of Keras 3.6 wants a static length, which texts lack in a graph there.
    text = keras.layers.Reshape((3 * 4,))(inner(word))
    known = keras.layers.IntegerLookup(vocabulary=[5, 7], output_mode="one_hot")(number)
    one = keras.layers.StringLookup(vocabulary=["a b", "c"], output_mode="one_hot")
    own = keras.layers.StringLookup(vocabulary=["5"])
    number_text = keras.layers.Lambda(
        lambda x: tf.strings.as_string(x), output_shape=(1,), dtype="string"
    )(number)
    rest = [known, one(word), crossed, own(number_text)]
    every = keras.layers.Concatenate()(
        [text, *(keras.ops.cast(x, "float32") for x in rest)]
    )
    model = keras.Model([word, number], mixture(keras.layers.Dense(4)(every)))
    numbers = tf.constant([[5], [7], [9]], tf.int64)
    return model, [WORDS, numbers], {"word": WORDS, "n": numbers}, ["outputs"]


@case
def a_table_in_a_list_of_a_layer():
    class Own(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            keys = tf.lookup.KeyValueTensorInitializer(["a b"], [2.0])
            self.things = [{"table": tf.lookup.StaticHashTable(keys, -1.0)}]
            self.plain = [tf.Variable(3.0)]

        def call(self, words):
            return self.things[0]["table"].lookup(words) * self.plain[0]

    word = named("word", (), dtype="string")
    return keras.Model(word, Own()(word)), WORDS, {"word": WORDS}, ["outputs"]


@case
def keys_out_of_order():
    inputs = {"user": named("user"), "item": named("item")}
    difference = keras.layers.Dense(4)(inputs["user"]) - 2 * inputs["item"]
    given = {"user": U, "item": V}
    return keras.Model(inputs, mixture(difference)), given, given, ["outputs"]


@case
def nested_inputs():
    a, b, c = named("z"), named("y"), named("c")
    model = keras.Model({"z": a, "in": {"y": b, "c": [c]}}, mixture(a - 2 * b + 3 * c))
    given = {"z": U, "in": {"y": V, "c": [U + V]}}
    return model, given, {"z": U, "y": V, "c": U + V}, ["outputs"]


@case
def an_optional_input():
    class Add(keras.layers.Layer):
        def call(self, x, y=None):
            return x if y is None else x - y

        def compute_output_shape(self, x_shape, y_shape=None):
            return x_shape

    a, b = named("a"), named("b", optional=True)
    return keras.Model([a, b], Add()(a, b)), [U, V], {"a": U, "b": V}, ["outputs"]


@case
def names_that_are_no_identifiers():
    inputs = [named("user id"), named("1st"), named("_x"), named("class")]
    a, b, c, d = inputs
    names = ["user_id", "arg_1st", "arg__x", "arg_class"]
    given = [U, V, U + V, U - V]
    model = keras.Model(inputs, a - 2 * b + 3 * c - 4 * d)
    return model, given, dict(zip(names, given, strict=True)), ["outputs"]


@case
def two_heads():
    x = named("x")
    h = mixture(x)
    heads = [keras.layers.Dense(n, name=f"head_{n}") for n in (3, 2)]
    return (
        keras.Model(x, [head(h) for head in heads]),
        U,
        {"x": U},
        ["head_3", "head_2"],
    )


@case
def a_layer_twice_in_a_tuple():
    a, b = named("a"), named("b")
    head = keras.layers.Dense(2, name="head")
    model = keras.Model((a, b), (head(a), head(b)))
    return model, (U, V), {"a": U, "b": V}, ["head", "head_1"]


@case
def nested_outputs():
    x = named("x")
    model = keras.Model(x, {"y": x * 2, "rest": [mixture(x), {"q": x * 4}]})
    return model, U, {"x": U}, ["rest_0", "rest_1_q", "y"]


@case
def a_list_of_one():
    x = named("x")
    return keras.Model(x, [mixture(x)]), U, {"x": U}, ["outputs"]


@case
def the_inputs_themselves():
    dtypes = {"f": "float16", "i": "int64", "b": "bool", "u": "uint8"}
    inputs = [named(name, (), dtype=dtype) for name, dtype in dtypes.items()]
    given = [tf.cast(U[:, 0] > 0, dtype) for dtype in dtypes.values()]
    by_name = dict(zip(dtypes, given, strict=True))
    return keras.Model(inputs, inputs), given, by_name, list(dtypes)


@case
def a_fixed_batch():
    x = keras.Input(batch_shape=(2, 4), name="x")
    return keras.Model(x, mixture(x)), U, {"x": U}, ["outputs"]


@case
def mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    x = named("x")
    return keras.Model(x, [mixture(x), x]), U, {"x": U}, ["moe", "x"]


@case
def sequential_without_input():
    model = keras.Sequential(
        [keras.layers.StringLookup(vocabulary=["a b"]), keras.layers.Embedding(2, 3)]
    )
    model(WORDS)
    return model, WORDS, {model.inputs[0].name: WORDS}, ["outputs"]


class Called(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [keras.layers.Dense(4), keras.layers.Dense(4)]
        gating = layers.NoisyTopKGating(k=2, gate_initializer="glorot_normal")
        self.mixture = layers.MoE(layers.FeedForwardExperts(4, 8), gating)

    def call(self, pair, training=False):
        answers = self.parts[0](pair["b"]) - self.parts[1](pair["a"][0])
        return self.mixture(answers), None, {"inner": answers}


@case
def subclassed_and_called():
    model, given = Called(), {"b": U, "a": [V]}
    model(given)
    return model, given, {"b": U, "a_0": V}, ["output_0", "output_2_inner"]


@case
def subclassed_of_a_tensor():
    class Own(keras.Model):
        def call(self, features):
            return [features * 2, features - 1]

    model = Own()
    model(U)
    return model, U, {"features": U}, ["output_0", "output_1"]


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_what_keras_exports_is_exported(make, tmp_path):
    model, given, inputs, names = make()
    path = keras_moe.serving.export(model, tmp_path)
    loaded = tf.saved_model.load(str(path)).signatures["serving_default"]
    found = loaded(**{name: tf.constant(value) for name, value in inputs.items()})
    outputs = keras.tree.flatten(model(given, training=False))
    wanted = dict(zip(names, (t for t in outputs if t is not None), strict=True))
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(
            tf.cast(found[name], tf.float32), tf.cast(value, tf.float32), atol=1e-6
        )


def test_tables_are_loaded_by_the_server(tmp_path):
    model, given, inputs, _ = CASES["lookups_at_every_depth"]()
    path = keras_moe.serving.export(model, tmp_path)
    size = sum(p.stat().st_size for p in (path / "variables").iterdir())
    assert size < 4 * model.count_params() + 4096  # once, and an index
    with Child(path) as child:
        words = [word.decode() for word in inputs["word"].numpy()]
        answer = child("serving_default", word=words, n=inputs["n"].numpy())
    np.testing.assert_allclose(answer["outputs"], model(given), atol=1e-6)


def test_an_input_signature_says_what_a_subclassed_model_takes(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.lookup = keras.layers.StringLookup(vocabulary=["a b"])

        def call(self, words, weights):
            return tf.cast(self.lookup(words), "float32") * weights

    model = Own()
    weights = tf.constant([1.0, 2.0, 3.0])
    model(WORDS, weights)
    signature = [tf.TensorSpec([None], "string"), keras.InputSpec("float32", [3])]
    path = keras_moe.serving.export(model, tmp_path, input_signature=signature)
    loaded = tf.saved_model.load(str(path)).signatures["serving_default"]
    found = loaded(words=WORDS, weights=weights)["outputs"]
    np.testing.assert_array_equal(found, model(WORDS, weights))
    with pytest.raises(ValueError, match="`input_signature` must hold specs.*'x'"):
        keras_moe.serving.export(model, tmp_path, input_signature=["x"])
    language_model = keras_moe.models.MoELanguageModel(20, 8)
    language_model.build((None, None))
    with pytest.raises(ValueError, match="`input_signature` is for.*MoELanguageModel"):
        keras_moe.serving.export(language_model, tmp_path, input_signature=signature)


def test_routing_of_mixtures_of_one_name(tmp_path):
    def part():
        x = keras.Input((4,))
        return keras.Model(x, mixture(x, name="moe"))

    x = named("x")
    path = keras_moe.serving.export(keras.Model(x, part()(part()(x))), tmp_path)
    routing = tf.saved_model.load(str(path)).signatures["routing"](x=tf.constant(U))
    assert sorted(routing) == [
        "moe_1_experts",
        "moe_1_gates",
        "moe_experts",
        "moe_gates",
    ]


def test_routing_that_cannot_be_seen_is_left_out(tmp_path):
    x = named("x", (5, 4))
    layer = layers.MoE(layers.FeedForwardExperts(4, 8), layers.NoisyTopKGating(k=2))

    class Loop(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def call(self, x):
            return tf.map_fn(self.layer, x)

    model = keras.Model(x, Loop()(x))
    loaded = tf.saved_model.load(str(keras_moe.serving.export(model, tmp_path)))
    assert set(loaded.signatures) == {"serving_default"}
    with pytest.raises(ValueError, match="`routing` cannot look at 'moe"):
        keras_moe.serving.export(model, tmp_path, signatures=["routing"])


def test_names_become_different():
    assert unique_names(["d", "d", "d_1", "d"]) == ["d", "d_2", "d_1", "d_3"]
