import csv
import io

import keras
import numpy as np
import pytest

from keras_moe import layers, telemetry

WORDS = np.array(["", *(f"w{i}" for i in range(1, 12))], dtype=object)


def make_model(mask=False, **options):
    moe = layers.MoE(
        layers.FeedForwardExperts(options.pop("num_experts", 4), 8),
        options.pop("gating", layers.TopKGating(k=2)),
        name="moe",
    )
    embedding = keras.layers.Embedding(len(WORDS), 8, mask_zero=mask)
    model = keras.Sequential([embedding, moe])
    model.build((None, 6))
    return model


def make_batches(rng, number=3):
    return [rng.integers(1, len(WORDS), (2, 6)).astype("int32") for _ in range(number)]


def shown(batches, **options):
    return telemetry.ExpertSpecialization(batches, lambda b: WORDS[b], **options)


def dense_gates(model, batch):
    """`(N, E)` gates of a batch, from the gate's weights alone."""
    x = model.layers[0](batch).numpy().reshape(-1, 8)
    logits = x @ model.layers[1].gating.gate_kernel.numpy()
    gates = np.zeros_like(logits)
    for row, out in zip(logits, gates, strict=True):
        top = np.argsort(-row)[:2]
        e = np.exp(row[top] - row[top].max())
        out[top] = e / e.sum()
    return gates


def test_contexts_are_those_of_the_largest_gates(rng):
    model, batches = make_model(), make_batches(rng)
    found = shown(batches, num_contexts=5, window=2).analyze(model)["moe"]
    for expert in range(4):
        candidates = []
        for batch in batches:
            gates = dense_gates(model, batch)[:, expert].reshape(batch.shape)
            for ids, row in zip(batch, gates, strict=True):
                words = list(WORDS[ids])
                candidates += [
                    (
                        gate,
                        " ".join(words[max(0, t - 2) : t]),
                        words[t],
                        " ".join(words[t + 1 : t + 3]),
                    )
                    for t, gate in enumerate(row)
                    if gate > 0
                ]
        assert found.counts[expert] == len(candidates)
        expected, seen = [], set()
        for candidate in sorted(candidates, key=lambda c: -c[0]):
            if candidate[1:] not in seen:
                expected.append(candidate)
                seen.add(candidate[1:])
        contexts = found.contexts[expert]
        assert len(contexts) == min(5, len(expected))
        for context, candidate in zip(contexts, expected, strict=False):
            assert context.gate == pytest.approx(candidate[0], rel=1e-4)
        # Where no two gates are nearly the same, the texts agree in their order, too.
        gates = [c[0] for c in expected]
        if len(gates) > 5 and np.min(-np.diff(gates[:6])) > 1e-5:
            assert [tuple(c[1:]) for c in contexts] == [c[1:] for c in expected[:5]]


def test_the_words_of_an_expert_are_counted(rng):
    model = make_model(gating=layers.TopKGating(k=2, gate_initializer="zeros"))
    batch = np.array([[1, 1, 1, 2, 2, 3]])
    found = shown([batch]).analyze(model)["moe"]
    # All logits tie: experts 0 and 1 take every token.
    assert found.counts.tolist() == [6, 6, 0, 0]
    assert found.words[0] == (("w1", 3), ("w2", 2), ("w3", 1))
    assert found.words[2] == found.contexts[2] == ()


def test_padding_is_in_no_context_of_its_own():
    model = make_model(mask=True)
    batch = np.array([[1, 2, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8]])
    found = shown([batch], labels=lambda b: b).analyze(model)["moe"]
    assert found.counts.sum() == 2 * 8
    assert "0" not in found.labels
    assert all(c.word for contexts in found.contexts for c in contexts)


def test_information_on_labels_of_tokens_and_of_rows(rng):
    model, batches = make_model(), make_batches(rng, 40)
    # The experts depend on the word alone here, and so tell much about it ...
    found = shown(batches, labels=lambda b: b).analyze(model)["moe"]
    assert found.labels == tuple(map(str, sorted(range(1, 12), key=int)))
    assert found.information.information > 3 * max(found.information.shuffled)
    # ... but nothing about a label that rows have by chance.
    by_row = shown(batches, labels=lambda b: b[:, 0] % 2 * 0 + np.arange(2))
    information = by_row.analyze(model)["moe"].information
    assert information.counts.shape == (4, 2)
    assert information.information < 2 * max(information.shuffled)


def test_gates_that_vary_in_number_and_one_expert(rng):
    model, batches = make_model(gating=layers.BalancedGating(k=2)), make_batches(rng)
    model.layers[1].gating.thresholds.assign([0.2, 0.25, 0.25, 0.3])
    found = shown(batches).analyze(model)["moe"]
    assert found.counts.sum() > 0
    one = make_model(num_experts=1, gating=layers.SoftmaxGating())
    with pytest.raises(ValueError, match="with 0 of them"):
        shown(batches).analyze(one)


def test_files_are_written_when_training_ends(rng, tmp_path):
    model, batches = make_model(), make_batches(rng)
    model.compile("sgd", "mse")
    names = np.array(["", "<b>&", *WORDS[2:]], dtype=object)
    callback = telemetry.ExpertSpecialization(
        batches,
        lambda b: names[b],
        folder=tmp_path / "new",
        labels=lambda b: b > 5,
        label_name="half",
    )
    y = np.zeros((2, 6, 8), "float32")
    model.fit(batches[0], y, verbose=0, callbacks=[callback])
    found = callback.analyze(model)["moe"]
    text = (tmp_path / "new" / "moe_experts.txt").read_text()
    assert text.count("\nExpert ") == 4
    assert "Mutual information of expert and half, over 2 labels" in text
    best = found.contexts[0][0]
    assert f"{best.gate:.2f}  {best.before} [{best.word}] {best.after}" in text
    rows = list(
        csv.DictReader(io.StringIO((tmp_path / "new/moe_experts.csv").read_text()))
    )
    assert len(rows) == sum(map(len, found.contexts))
    assert float(rows[0]["gate"]) == pytest.approx(best.gate, abs=1e-6)
    # The busiest expert comes first.
    busiest = int(np.argmax(found.counts))
    assert text.index(f"\nExpert {busiest}:") == text.index("\nExpert ")


def test_errors(rng):
    model, batches = make_model(), make_batches(rng)
    with pytest.raises(ValueError, match="num_contexts=0"):
        shown(batches, num_contexts=0)
    with pytest.raises(ValueError, match="0 batches"):
        shown([]).analyze(model)
    with pytest.raises(ValueError, match=r"\(2, 5\) for tokens of shape \(2, 6\)"):
        telemetry.ExpertSpecialization(batches, lambda b: WORDS[b[:, 1:]]).analyze(
            model
        )
    with pytest.raises(ValueError, match=r"`labels` .*\(3,\)"):
        shown(batches, labels=lambda b: np.zeros(3)).analyze(model)


def test_former_names_say_what_to_write():
    for old, new in (
        ("ExpertSpecialisation", telemetry.ExpertSpecialization),
        ("Specialization", telemetry.ExpertContexts),
    ):
        with pytest.warns(DeprecationWarning, match=rf"telemetry\.{new.__name__}\."):
            assert getattr(telemetry, old) is new
