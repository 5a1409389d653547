"""Language models answer strings through the C++ loader as the Keras model does."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text
from tensorflow_serving.apis import prediction_log_pb2

import keras_moe
from examples.serving.c_api_child import Child
from keras_moe import data, layers, models

OPS = Path(tensorflow_text.__file__).parent / "python" / "ops"
SPLITTER = [str(OPS / "_regex_split_ops.so")]
TEXTS = ["she was not happy .", "", "he was\nvery well .", "日本 <pad> she"]
BAD_BYTES = b"she \xff\xfe was"


@pytest.fixture(scope="module")
def corpus():
    words = [
        "she",
        "he",
        "was",
        "not",
        "very",
        "happy",
        "well",
        ".",
        ",",
        "and",
        "the",
        "day",
    ]
    return data.Vocabulary.from_tokens([words])


def make(vocabulary, **options):
    middle = layers.MoE(
        layers.FeedForwardExperts(5, hidden_units=8),
        layers.NoisyTopKGating(k=2, gate_initializer="glorot_normal"),
        name="middle",
    )
    model = models.MoELanguageModel(len(vocabulary), 8, middle=middle, **options)
    model.build((None, None))
    generator = np.random.default_rng(3)
    for weight in model.trainable_weights:
        # Far from uniform, so that a wrong order of tokens is seen.
        weight.assign(weight + 0.5 * generator.normal(size=weight.shape))
    return model


def settings(rows, **given):
    values = {"temperature": 1.0, "top_k": 0, "max_new_tokens": 6, "seed": 1, **given}
    dtypes = {"temperature": "float32", "seed": "int64"}
    return {
        name: np.broadcast_to(np.array(value, dtypes.get(name, "int32")), [rows])
        for name, value in values.items()
    }


def ids_of(vocabulary, text):
    lines = [
        vocabulary.encode(data.tokenize(line, "words")) for line in text.split("\n")
    ]
    return [i for line in lines for i in [*line, 2]]


@pytest.mark.slow
def test_scores_continuations_and_routing_of_strings(corpus, tmp_path):
    model = make(corpus)
    path = keras_moe.serving.export(model, tmp_path, text=corpus)
    with pytest.raises(RuntimeError, match="RegexSplit"):
        Child(path)
    with Child(path, SPLITTER) as child:
        # Scores, by hand from the logits of the Keras model, one text at a time.
        score = child("score", text=TEXTS)
        for row, text in enumerate(TEXTS):
            ids = ids_of(corpus, text)
            logits = model(np.array([[2, *ids[:-1]]], "int32"))
            expected = tf.nn.log_softmax(logits)[0].numpy()[np.arange(len(ids)), ids]
            found = score["token_log_probs"][row]
            np.testing.assert_allclose(found[: len(ids)], expected, atol=1e-5)
            assert not found[len(ids) :].any()
            np.testing.assert_allclose(
                score["log_prob"][row], expected.sum(), rtol=1e-5
            )
            np.testing.assert_allclose(
                score["perplexity"][row], np.exp(-expected.mean()), rtol=1e-5
            )
            assert score["num_tokens"][row] == len(ids)
            names = [name.decode() for name in score["tokens"][row]]
            assert names == [*corpus.decode(ids), *[""] * (len(names) - len(ids))]
            alone = child("score", text=[text])
            np.testing.assert_allclose(
                alone["log_prob"], score["log_prob"][row : row + 1], atol=1e-6
            )

        # A greedy loop through the Keras model.
        for way in {"top_k": 1}, {"temperature": 0.0}:
            answer = child("generate", prompt=TEXTS, **settings(len(TEXTS), **way))
            for row, text in enumerate(TEXTS):
                ids = [2, *ids_of(corpus, text)[:-1]]
                begin = len(ids)
                for _ in range(6):
                    logits = model(np.array([ids], "int32"))[0, -1].numpy()
                    logits[:2] = -np.inf
                    ids.append(int(logits.argmax()))
                tokens = [token.decode() for token in answer["tokens"][row]]
                assert tokens == corpus.decode(ids[begin:])
                assert answer["text"][row].decode() == corpus.to_text(ids[1:])
                continuation = corpus.to_text(ids[begin:])
                assert answer["continuation"][row].decode() == continuation

        # Seeds: the same gives the same text, whatever shares the batch.
        mixed = settings(
            4, seed=[1, 2, 1, -5], temperature=[1.0, 2.0, 0.5, 1.0], top_k=[0, 3, 9, 2]
        )
        mixed["max_new_tokens"] = np.array([6, 1, 30, 12], "int32")
        answer = child("generate", prompt=TEXTS, **mixed)
        for row in range(4):
            one = {name: value[row : row + 1] for name, value in mixed.items()}
            alone = child("generate", prompt=TEXTS[row : row + 1], **one)
            wanted = one["max_new_tokens"][0]
            np.testing.assert_array_equal(
                alone["tokens"][0], answer["tokens"][row, :wanted]
            )
            assert not any(answer["tokens"][row, wanted:])
            assert alone["text"] == answer["text"][row]
        seeds = settings(20, seed=np.arange(20))
        texts = child("generate", prompt=["she"] * 20, **seeds)["text"]
        assert len(set(texts)) > 10
        assert not any(b"<" in t for t in texts)

        # As `generate` of the Keras model.
        prompt = np.array([[2, *corpus.encode(["she", "was"])]], "int32")
        in_keras = model.generate(prompt, 8, seed=7, top_k=5, forbidden_tokens=(0, 1))
        answer = child(
            "generate",
            prompt=["she was"],
            **settings(1, seed=7, top_k=5, max_new_tokens=8),
        )
        assert answer["text"][0].decode() == corpus.to_text(in_keras[0, 1:])

        # Routing, as the Keras model reports it.
        routing = child("routing", text=TEXTS)
        for row, text in enumerate(TEXTS):
            ids = np.array([ids_of(corpus, text)], "int32")
            experts, gates = model.routing(ids)["middle"]
            length = ids.shape[1]
            found = routing["middle_experts"][row]
            np.testing.assert_array_equal(found[:length], experts[0])
            np.testing.assert_array_equal(found[length:], -1)
            np.testing.assert_allclose(
                routing["middle_gates"][row, :length], gates[0], atol=1e-6
            )

        # Odd texts get answers.
        odd = child("score", text=[BAD_BYTES, b"she " * 3000])
        assert odd["num_tokens"].tolist() == [5, 3001]
        assert np.isfinite(odd["log_prob"]).all()
        answer = child("generate", prompt=[BAD_BYTES], **settings(1))
        assert answer["text"][0]

        # Wrong settings get clear errors, and the model stays alive.
        for name, value, message in (
            ("temperature", -1.0, "temperature"),
            ("temperature", np.nan, "temperature"),
            ("top_k", -1, "top_k"),
            ("top_k", 1000, "from 0 (all) to"),
            ("max_new_tokens", 0, "max_new_tokens"),
            ("max_new_tokens", 2000, "1 to 1024"),
        ):
            with pytest.raises(RuntimeError) as error:
                child.ask("generate", prompt=["she"], **settings(1, **{name: value}))
            assert message in str(error.value)
        with pytest.raises(RuntimeError, match="one value a row"):
            child.ask("generate", prompt=["she"], **settings(2))
        with pytest.raises(RuntimeError):
            child.ask("score", text=[["she"]])
        assert child("score", text=["she"])["num_tokens"] == [2]


def test_generate_of_ids_is_that_of_keras(corpus, tmp_path):
    model = make(corpus, lstm_units=12)
    path = keras_moe.serving.export(model, tmp_path, signatures=["generate"])
    prompts = np.array([[2, 5, 0, 0], [2, 4, 6, 7]], "int32")
    with Child(path) as child:
        names = set(child.loaded["signatures"]) - {"__saved_model_init_op"}
        assert names == {"generate"}
        answer = child("generate", inputs=prompts, **settings(2, seed=[3, 4]))
        for row, length in enumerate((2, 4)):
            alone = model.generate(prompts[row : row + 1, :length], 6, seed=3 + row)
            np.testing.assert_array_equal(answer["tokens"][row], alone[0, length:])
        with pytest.raises(RuntimeError, match="at least one token a row"):
            child.ask("generate", inputs=0 * prompts, **settings(2))


@pytest.mark.slow
def test_warmup_requests_replay_through_the_loader(corpus, tmp_path):
    requests = [
        ("score", {"text": ["she was", ""]}),
        ("generate", {"prompt": ["he"], **settings(1)}),
        ("serving_default", {"inputs": [[4, 5]]}),
    ]
    path = keras_moe.serving.export(
        make(corpus), tmp_path / "austen", text=corpus, warmup=requests
    )
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    with Child(path, SPLITTER) as child:
        names = []
        for record in tf.data.TFRecordDataset(str(file)):
            log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
            request = log.predict_log.request
            assert request.model_spec.name == "austen"
            names.append(request.model_spec.signature_name)
            inputs = {k: tf.make_ndarray(v) for k, v in request.inputs.items()}
            assert child(names[-1], **inputs)
    assert names == [name for name, _ in requests]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([("nothing", {})], "exported signatures. Received: 'nothing'"),
        ([("score", {"inputs": ["she"]})], "must run"),
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.exhaustive])
            for case in (
                ([("score", {"ids": [[1]]})], r"must have the inputs \['inputs'\]"),
                (
                    [("generate", {"inputs": [[0]], **settings(1)})],
                    "at least one token",
                ),
                (
                    [("score", {"inputs": [[1]]})] * 1001,
                    "at most 1000 requests. Received: 1001",
                ),
            )
        ),
    ],
)
def test_a_warmup_that_would_fail_is_refused(corpus, tmp_path, requests, message):
    with pytest.raises(ValueError, match=message):
        keras_moe.serving.export(make(corpus), tmp_path, warmup=requests)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(corpus, tmp_path):
    other = data.Vocabulary.from_tokens([["one"]])
    with pytest.raises(ValueError, match="4 tokens, vocabulary_size=15"):
        keras_moe.serving.export(make(corpus), tmp_path, text=other)
    with pytest.raises(ValueError, match=r"Received: \['translate'\]"):
        keras_moe.serving.export(make(corpus), tmp_path, signatures=["translate"])


def test_cudnn_is_never_traced(corpus, tmp_path, monkeypatch):
    model = make(corpus)
    seen = []
    call = type(model.first_lstm).call

    def spy(self, *args, **kwargs):
        seen.append(self.use_cudnn)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(model.first_lstm), "call", spy)
    before = model.first_lstm.use_cudnn
    keras_moe.serving.export(model, tmp_path)
    assert seen
    assert not any(seen)
    assert model.first_lstm.use_cudnn == before
