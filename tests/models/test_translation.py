"""The translation model: padding, steps, searches, files."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import data, layers, models, telemetry

PAD, EOS, SIZE = 0, 2, 20


def mixture(name, gating=None, k=2):
    return layers.MoE(
        layers.FeedForwardExperts(5, hidden_units=8),
        gating
        or layers.NoisyTopKGating(
            k=k, gate_initializer="glorot_normal", noise_initializer="glorot_normal"
        ),
        importance_loss_weight=0.3,
        load_loss_weight=0.3,
        activation="sigmoid",
        name=name,
    )


def small(size=SIZE, **options):
    options = {
        "encoder_middle": mixture("encoder_moe"),
        "decoder_middle": mixture("decoder_moe"),
        "dropout": 0.0,
        **options,
    }
    model = models.MoETranslator(size, 8, **options)
    model.build(None)
    # Weights large enough for attention and gates to prefer something.
    generator = np.random.default_rng(3)
    for weight in model.trainable_weights:
        if weight.path.endswith(("kernel", "embeddings", "scale")):
            weight.assign(generator.normal(size=weight.shape, scale=0.7))
    return model


def shifted(targets):
    before = np.pad(targets[:, :-1], [[0, 0], [1, 0]], constant_values=EOS)
    return np.where(targets == PAD, PAD, before).astype("int32")


def sentences(rng, lengths, size=SIZE):
    ids = np.zeros((len(lengths), max(lengths)), "int32")
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.integers(3, size, length)
        row[length - 1] = EOS
    return ids


@pytest.fixture
def batch(rng):
    return sentences(rng, (5, 3, 4)), sentences(rng, (2, 6, 4))


def loss_and_gradients(model, source, targets, training):
    """Of compiled cross-entropy and balancing losses, as `fit` forms them."""
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    inputs = (tf.constant(source), tf.constant(shifted(targets)))
    with tf.GradientTape() as tape:
        logits = model(inputs, training=training)
        loss = model.compute_loss(inputs, tf.constant(targets), logits)
    variables = model.trainable_variables
    gradients = tape.gradient(loss, [v.value for v in variables])
    return float(loss), {
        v.path: tf.convert_to_tensor(g).numpy() if g is not None else None
        for v, g in zip(variables, gradients, strict=True)
    }


@pytest.mark.parametrize("gating", ["top_k", "balanced", "hierarchical"])
def test_padding_changes_neither_loss_nor_gradients(batch, gating):
    def make(name):
        if gating == "hierarchical":
            return layers.HierarchicalMoE(
                layers.FeedForwardExperts(6, hidden_units=8), 3, k=(2, 1), name=name
            )
        gate = (
            layers.BalancedGating(k=2)
            if gating == "balanced"
            # Without noise, so that the same tokens get the same gates.
            else layers.TopKGating(k=2, gate_initializer="glorot_normal")
        )
        return mixture(name, gate)

    model = small(encoder_middle=make("a"), decoder_middle=make("b"))
    source, targets = batch
    # The noise of a hierarchical mixture depends on the number of tokens only, which
    # padding does not change, and not on their positions; it is off for the others.
    training = gating != "hierarchical"
    loss, gradients = loss_and_gradients(model, source, targets, training)
    padded = np.pad(source, [[0, 0], [0, 4]]), np.pad(targets, [[0, 0], [0, 3]])
    again, others = loss_and_gradients(model, *padded, training)
    assert again == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == others.keys()
    for path, gradient in gradients.items():
        if gradient is None:
            assert others[path] is None
            continue
        np.testing.assert_allclose(others[path], gradient, atol=2e-6, err_msg=path)
    assert max(np.abs(g).max() for g in gradients.values() if g is not None) > 0.01


def test_padding_does_not_enter_the_balance_statistics(batch):
    model = small()
    source, targets = batch
    for width in (0, 5):
        for layer in model.moe_layers:
            layer.balance.reset_state()
        ids = (
            np.pad(source, [[0, 0], [0, width]]),
            np.pad(targets, [[0, 0], [0, width]]),
        )
        model((ids[0], shifted(ids[1])))
        encoder, decoder = (
            layer.balance.counts().numpy() for layer in model.moe_layers
        )
        assert encoder.sum() == 2 * np.sum(source != PAD)
        assert decoder.sum() == 2 * np.sum(targets != PAD)


def test_the_loss_is_the_mean_over_real_targets(batch):
    model = small(
        encoder_middle=None, decoder_middle=None, encoder_lstms=2, middle_after=(1, 1)
    )
    source, targets = batch
    loss, _ = loss_and_gradients(model, source, targets, False)
    log_probs = tf.nn.log_softmax(model((source, shifted(targets)))).numpy()
    expected = [
        -log_probs[b, t, targets[b, t]]
        for b, t in zip(*np.nonzero(targets), strict=True)
    ]
    assert loss == pytest.approx(np.mean(expected), rel=1e-6)
    scores = model.score(source, targets).numpy()
    assert -scores.sum() == pytest.approx(np.sum(expected), rel=1e-6)


@pytest.mark.parametrize("lstm_units", [None, 16])
def test_step_by_step_equals_teacher_forcing(batch, lstm_units):
    model = small(lstm_units=lstm_units, decoder_lstms=3)
    source, targets = batch
    inputs = shifted(targets)
    expected = model((source, inputs))
    memory, mask = model.encode(tf.constant(source))
    state = model.initial_state(len(source))
    for step in range(inputs.shape[1]):
        logits, state = model.decode(inputs[:, step : step + 1], memory, mask, state)
        real = targets[:, step] != PAD
        np.testing.assert_allclose(
            logits[:, 0][real][:, 1:], expected[:, step][real][:, 1:], atol=1e-5
        )


@pytest.mark.slow
def test_a_sentence_is_translated_alike_in_any_batch(batch):
    model = small()
    source, _ = batch
    together, scores = model.search(source, num_beams=3, max_length=7)
    for row, ids in enumerate(source):
        length = np.sum(ids != PAD)
        alone, score = model.search(ids[np.newaxis, :length], num_beams=3, max_length=7)
        width = alone.shape[-1]
        np.testing.assert_array_equal(alone[0, 0], together[row, 0, :width])
        assert not np.any(together[row, 0, width:])
        np.testing.assert_allclose(score[0, 0], scores[row, 0], rtol=1e-5)


def make_end_likelier(model, by):
    bias = np.array(model.softmax.bias)
    bias[EOS] += by
    model.softmax.bias.assign(bias)


def greedy(model, source, max_length):
    """The most probable token after each other, one sentence at a time."""
    found = []
    for ids in source:
        ids = ids[ids != PAD][np.newaxis]
        tokens = [EOS]
        while len(tokens) <= max_length:
            logits = model((ids, np.array([tokens], "int32")))
            tokens.append(int(np.argmax(logits[0, -1])))
            if tokens[-1] == EOS:
                break
        found.append(tokens[1:])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_one_beam_is_greedy(rng, length_penalty):
    model = small()
    # The end is now the second-best token now and then, which is where a search of one
    # beam and greedy decoding part.
    make_end_likelier(model, 1.0)
    source = sentences(rng, (5, 3, 4, 6, 2, 5, 5, 3))
    tokens, scores = model.search(
        source, num_beams=1, max_length=9, length_penalty=length_penalty
    )
    expected = greedy(model, source, 9)
    lengths = {len(row) for row in expected}
    assert len(lengths) > 1  # some ended early, or there is nothing to see
    for found, wanted, score, ids in zip(
        tokens[:, 0].numpy(), expected, scores[:, 0].numpy(), source, strict=True
    ):
        assert found[found != PAD].tolist() == wanted
        log_prob = model.score(ids[np.newaxis], np.array([wanted])).numpy()[0]
        if EOS in wanted:
            log_prob /= ((5 + len(wanted)) / 6) ** length_penalty
        assert score == pytest.approx(log_prob, rel=1e-5)


def exhaustive(model, ids, size, max_length, length_penalty):
    """All sequences that end within `max_length`, the best score first."""
    found = []
    symbols = [i for i in range(size) if i not in (PAD, EOS)]
    for length in range(1, max_length + 1):
        for words in itertools.product(symbols, repeat=length - 1):
            sequence = [*words, EOS]
            target = np.array([sequence], "int32")
            log_prob = float(model.score(ids[np.newaxis], target)[0])
            found.append((log_prob / ((5 + length) / 6) ** length_penalty, sequence))
    return sorted(found, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 0.8])
def test_a_beam_of_the_whole_vocabulary_is_exhaustive(rng, length_penalty):
    # 5 symbols (one never used), sequences of up to 3: at most 4 * 4 = 16 unfinished
    # hypotheses, and 25 beams.
    size, max_length = 5, 3
    model = small(size)
    make_end_likelier(model, -2.0)  # or `<eos>` at once is always the best
    best = set()
    for ids in sentences(rng, (4, 3, 2, 3, 4, 3), size):
        ids = ids[ids != PAD]
        tokens, scores = model.search(
            ids[np.newaxis],
            num_beams=25,
            max_length=max_length,
            length_penalty=length_penalty,
        )
        wanted = exhaustive(model, ids, size, max_length, length_penalty)
        # 1 + 3 + 9 sequences end within 3 tokens.
        assert len(wanted) == 13
        best.add(tuple(wanted[0][1]))
        # The search stops when nothing can become the best: lower ranks may be
        # empty, or be hypotheses that went on after their end, at -1e7.
        found = [tuple(row[row != PAD]) for row in tokens[0].numpy()]
        assert found[0] == tuple(wanted[0][1])
        score_of = {tuple(sequence): score for score, sequence in wanted}
        for sequence, score in zip(found, scores[0].numpy(), strict=True):
            if score > -1e6:
                assert score == pytest.approx(score_of[sequence], rel=1e-5)
    assert max(map(len, best)) > 1


def test_padding_is_never_predicted(batch):
    source, targets = batch
    model = small()
    model.compile(keras.optimizers.Adam(0.5), "mse")
    probabilities = tf.nn.softmax(model((source, shifted(targets))))
    np.testing.assert_array_equal(probabilities[..., PAD], 0.0)
    _, gradients = loss_and_gradients(model, source, targets, True)
    bias = next(g for path, g in gradients.items() if path.endswith("softmax/bias"))
    assert bias[PAD] == 0.0


def learnt(languages=("fr", "de")):
    texts = ["a cat sat on a mat", "the cat saw the mat", "le chat est là", "die Katze"]
    return data.SubwordVocabulary.learn(texts * 3, 60, languages, byte_fallback=False)


@pytest.mark.slow
def test_the_file_holds_the_vocabulary_and_translates_the_same(tmp_path):
    vocabulary = learnt()
    model = small(len(vocabulary), vocabulary=vocabulary)
    texts = ["the cat", "a mat sat", "", "the cat saw the cat on the mat"]
    options = {"num_beams": 2, "max_length": 8}
    expected = model.translate(texts, "de", **options)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert copy.vocabulary.languages == ("fr", "de")
    assert copy.translate(texts, "de", **options) == expected
    assert model.translate(texts[0], "de", **options) == expected[0]
    # Each by itself, in batches of one.
    assert model.translate(texts, "de", batch_size=1, **options) == expected
    other = model.translate(texts, ["fr", "de", "fr", "fr"], **options)
    assert other[1] == expected[1]
    assert other != expected
    assert model.translate([], "de") == []


def test_routing_and_attention_are_those_of_the_call(batch):
    source, targets = batch
    model = small()
    inputs = shifted(targets)
    routing = model.routing(source, inputs)
    assert set(routing) == {"encoder_moe", "decoder_moe"}
    experts, gates = routing["decoder_moe"]
    assert experts.shape == gates.shape == (*targets.shape, 2)
    for layer in model.moe_layers:
        layer.balance.reset_state()
    model((source, inputs))
    counts = model.moe_layers[1].balance.counts().numpy()
    np.testing.assert_array_equal(
        np.bincount(experts[inputs != PAD].ravel(), minlength=5), counts
    )
    weights = model.attention(source, inputs)
    assert weights.shape == (*targets.shape, source.shape[1])
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(weights[1, :, 3:], 0.0)  # 3 source tokens


@pytest.mark.slow
def test_it_learns_to_copy(rng):
    model = models.MoETranslator(
        12,
        24,
        encoder_middle=mixture("encoder_moe"),
        decoder_middle=mixture("decoder_moe"),
        dropout=0.0,
        encoder_lstms=2,
        middle_after=(1, 1),
    )
    ids = sentences(rng, [4] * 96, 12)
    model.compile(
        keras.optimizers.Adam(0.02, global_clipnorm=5.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[telemetry.Perplexity()],
    )
    dataset = tf.data.Dataset.from_tensors(((ids, shifted(ids)), ids)).repeat(8)
    history = model.fit(dataset, epochs=10, verbose=0, shuffle=False).history
    assert history["perplexity"][-1] < 0.5 * history["perplexity"][0]
    assert "decoder_moe_load_cv" in history


def test_errors(batch):
    source, targets = batch
    build = models.MoETranslator
    cases = [
        (r"middle_after=\(4, 1\)", lambda: build(9, 4, middle_after=(4, 1))),
        ("vocabulary_size=0", lambda: build(0, 4)),
        ("decoder_lstms=0", lambda: build(9, 4, decoder_lstms=0)),
        ("dropout=1.0", lambda: build(9, 4, dropout=1.0)),
        (
            r"must not be recurrent.*'gru'",
            lambda: build(9, 4, encoder_middle=keras.layers.GRU(4, name="gru")),
        ),
        (r"encoder_middle=\['x'\]", lambda: build(9, 4, encoder_middle=["x"])),
        (
            r"\['same'\] more than once",
            lambda: build(
                9, 4, encoder_middle=mixture("same"), decoder_middle=mixture("same")
            ),
        ),
        (
            r"vocabulary_size=9, len\(vocabulary\)=",
            lambda: build(9, 4, vocabulary=learnt()),
        ),
        ("two tensors.*EagerTensor", lambda: small()(source)),
        ("dtype=float32", lambda: small()((source.astype("float32"), targets))),
        ("num_beams=0", lambda: small().search(source, num_beams=0)),
        ("length_penalty=-1", lambda: small().search(source, length_penalty=-1)),
        ("vocabulary=None", lambda: small().translate("a cat")),
    ]
    for message, run in cases:
        with pytest.raises(ValueError, match=message):
            run()
    vocabulary = learnt()
    model = small(len(vocabulary), vocabulary=vocabulary)
    with pytest.raises(ValueError, match="target_language=None"):
        model.translate("a cat")
    with pytest.raises(ValueError, match="'nl'.*fr, de"):
        model.translate("a cat", "nl")
    with pytest.raises(ValueError, match="2 languages for 1 texts"):
        model.translate(["a cat"], ["de", "fr"])
    wide = layers.MoE(layers.FeedForwardExperts(4, 8, output_units=3), name="wide")
    with pytest.raises(ValueError, match="3 features, units=4"):
        build(9, 4, encoder_middle=wide).build(None)


@pytest.mark.parametrize("lstm_units", [None, 11])
def test_a_policy_is_that_of_every_layer_and_of_the_reloaded_model(
    batch, tmp_path, lstm_units
):
    options = {"encoder_middle": None, "decoder_middle": None, "lstm_units": lstm_units}
    model = small(dtype="float64", **options)
    inputs = (batch[0], shifted(batch[1]))
    assert {v.dtype for v in model.trainable_variables} == {"float64"}
    assert model(inputs).dtype == tf.float64
    model.save(tmp_path / "m.keras")
    reloaded = keras.saving.load_model(tmp_path / "m.keras")
    assert {v.dtype for v in reloaded.trainable_variables} == {"float64"}
    np.testing.assert_allclose(reloaded(inputs), model(inputs), rtol=1e-12)
    mixed = small(dtype="mixed_bfloat16", **options)
    assert {v.dtype for v in mixed.trainable_variables} == {"float32"}
    assert {layer.compute_dtype for layer in mixed.encoder} == {"bfloat16"}
    assert mixed(inputs).dtype == tf.float32
