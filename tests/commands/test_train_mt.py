import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text  # noqa: F401  (the ops of the SavedModel)

from keras_moe import data
from keras_moe.__main__ import main
from keras_moe.commands import folders, pairs, runs, train_mt
from keras_moe.commands.language_experts import experts_by_language
from keras_moe.commands.options import TrainMTOptions

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
EXAMPLE = EXAMPLES / "train_translation.py"
WORDS = {
    "en": ["one", "two", "six", "ten", "red", "sun"],
    "fr": ["un", "deux", "six", "dix", "rouge", "soleil"],
    "de": ["eins", "zwei", "sechs", "zehn", "rot", "Sonne"],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Sentences that are translated word by word."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for split, rows in (("train", 150), ("valid", 12), ("test", 12)):
        for other in ("fr", "de"):
            lines = []
            for _ in range(rows):
                ids = rng.integers(0, 6, size=rng.integers(1, 4))
                sides = [" ".join(WORDS[n][i] for i in ids) for n in ("en", other)]
                lines.append("\t".join(sides) + "\n")
            (folder / f"{split}.en-{other}.tsv").write_text("".join(lines))
    return folder


def small(data_dir, folder, **changes):
    return TrainMTOptions(
        **{
            "data_dir": str(data_dir),
            "output_dir": str(folder),
            "vocabulary_size": 300,
            "num_experts": 4,
            "k": 2,
            "units": 32,
            "hidden_units": 16,
            "dropout": 0.0,
            "learning_rate": 0.02,
            "warmup_steps": 5,
            "batch_tokens": 256,
            "epochs": 2,
            "num_beams": 2,
            "verbose": 0,
            **changes,
        }
    )


@pytest.mark.slow
def test_the_whole_job(data_dir, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    options = small(data_dir, folder, baseline=True, epochs=4, test_sentences=8)
    report = train_mt.run(options)
    assert set(report["directions"]) == {"en-de", "de-en", "en-fr", "fr-en"}
    for figures in (report, report["baseline"]):
        assert figures["test_perplexity"] < 30  # of about 300 subwords
        for row in figures["directions"].values():
            assert row["sentences"] == 8
            assert 0 <= row["bleu"] <= 100
    assert report["parameters"] > report["baseline"]["parameters"]
    assert report["encoder_moe_max_over_mean_load"] >= 1.0
    for name in ("encoder_moe", "decoder_moe"):
        figures = report[f"{name}_experts_and_languages"]
        assert figures["shuffled_mean"] <= figures["shuffled_max"]
    # The encoder sees the token of the language first, so its experts tell.
    encoder = report["encoder_moe_experts_and_languages"]
    assert encoder["mutual_information"] > encoder["shuffled_max"]
    printed = capsys.readouterr().out
    for text in (
        "BLEU|nrefs:1",
        "chrF|nrefs:1",
        "mutual information",
        "dense of equal",
    ):
        assert text in printed
    for name in ("loss", "attention", "encoder_moe_by_language"):
        assert (folder / f"{name}.png").stat().st_size > 0
    assert json.loads((folder / "report.json").read_text()) == report
    model = keras.saving.load_model(folder / "model.keras")
    texts = ["one two", "red sun"]
    wanted = model.translate(texts, "fr", num_beams=4, length_penalty=0.2)
    loaded = tf.saved_model.load(str(folder / "saved_model" / "1"))
    answer = loaded.signatures["translate"](
        texts=tf.constant(texts), target_languages=tf.constant(["fr"])
    )
    assert [t.decode() for t in answer["translations"].numpy()] == wanted
    monkeypatch.syspath_prepend(str(EXAMPLES))
    gate_noise = importlib.import_module("gate_noise")
    gate_noise.main([str(folder / "model.keras"), "--data-dir", str(data_dir)])
    printed = capsys.readouterr().out
    assert f"| no noise | {report['test_perplexity']:.3f} |" in printed
    assert "| noise in decoder_moe | " in printed
    source_information = importlib.import_module("source_information")
    paths = [str(folder / "model.keras")] * 2
    source_information.main([*paths, "--data-dir", str(data_dir)])
    first, second = re.findall(
        r"^\| direction .*?\| all [^\n]*", capsys.readouterr().out, re.M | re.S
    )
    assert first == second
    own, other, told = map(float, first.splitlines()[-1].split("|")[2:5])
    np.testing.assert_allclose(own, report["test_perplexity"], atol=0.006)
    assert told > 0.05  # it translates
    np.testing.assert_allclose(told, np.log(other / own), atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"gating": "balanced"}, marks=pytest.mark.exhaustive),
        pytest.param(
            {"num_groups": 2, "k": 1, "lstm_units": 48}, marks=pytest.mark.exhaustive
        ),
        {"gating": "balanced", "num_groups": 2, "k": 1},
        {"temperature": 5.0, "middle": "none"},
    ],
    ids=str,
)
def test_every_kind_of_model_trains(data_dir, tmp_path, changes):
    options = small(data_dir, tmp_path, directions="en-fr", epochs=1, **changes)
    report = train_mt.run(options)
    assert report["test_perplexity"] < 300
    assert list(report["directions"]) == ["en-fr"]


class _Cut(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 0:
            raise KeyboardInterrupt


def run_cut_after_one_epoch(options, monkeypatch):
    callbacks = runs.callbacks
    with monkeypatch.context() as patch:
        patch.setattr(runs, "callbacks", lambda *args: [*callbacks(*args), _Cut()])
        with pytest.raises(KeyboardInterrupt):
            train_mt.run(options)


@pytest.mark.slow
def test_a_cut_run_goes_on_with_the_pairs_that_come_next_and_is_not_repeated(
    data_dir, tmp_path, monkeypatch, capsys
):
    changes = {"directions": "en-fr", "steps_per_epoch": 3, "batch_tokens": 128}
    folder = tmp_path / "cut"
    options = small(data_dir, folder, **changes)
    with monkeypatch.context() as patch:
        # The last run below does all of the job; these only train and evaluate.
        patch.setattr(train_mt.serving, "export", lambda model, path: path)
        patch.setattr(train_mt, "_draw", lambda *arguments: [])
        whole = train_mt.run(small(data_dir, tmp_path / "whole", **changes))
        assert "3 steps an epoch" in capsys.readouterr().out
        run_cut_after_one_epoch(options, monkeypatch)
        report = train_mt.run(options)
    assert [row["epoch"] for row in folders.read_history(folder)] == [0, 1]
    for name in ("test_perplexity", "valid_perplexity"):
        assert report[name] == pytest.approx(whole[name], rel=1e-4)
    again = train_mt.run(options)
    assert again["training_seconds"] == report["training_seconds"]
    assert again["test_perplexity"] == pytest.approx(report["test_perplexity"])
    with pytest.raises(ValueError, match="units: 32 there, 16 now"):
        train_mt.run(small(data_dir, folder, **changes, units=16))


def test_experts_are_counted_by_the_target_language(data_dir, tmp_path):
    options = small(data_dir, tmp_path)
    corpus = train_mt.data.load_translation_corpus(data_dir)
    vocabulary = train_mt.data.SubwordVocabulary.learn(
        corpus.texts(), 300, corpus.target_languages
    )
    model = train_mt.build_model(options, vocabulary, "moe", 10)
    tables = experts_by_language(model, corpus, options, sentences=5)
    assert set(tables) == {"encoder_moe", "decoder_moe"}
    for table in tables.values():
        assert table.counts.shape == (4, 3)
        np.testing.assert_allclose(table.counts.sum(0), 1.0)
        # A gate that starts at zero ties: experts 0 and 1 take everything.
        np.testing.assert_allclose(table.counts[:2], 0.5)
        assert table.information == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_one_side_alone_may_have_the_mixture(data_dir, tmp_path, side):
    factors = {"expert_learning_rate": 0.5, "gate_learning_rate": 2.0}
    options = small(
        data_dir,
        tmp_path,
        mixtures=side,
        activation="linear",
        expert_dropout=0.25,
        **factors,
    )
    corpus = train_mt.data.load_translation_corpus(data_dir)
    vocabulary = train_mt.data.SubwordVocabulary.learn(
        corpus.texts(), 300, corpus.target_languages
    )
    model = train_mt.build_model(options, vocabulary, "moe", 10)
    found = {layer.name: layer for layer in model.moe_layers}
    paths = [v.path for v in model.trainable_variables]
    rates = dict(zip(paths, model.optimizer._rate_factors, strict=True))
    for name, layer in found.items():
        experts = options.num_experts if name == f"{side}_moe" else 1
        assert layer.num_experts == experts
        assert layer.activation is keras.activations.linear
        # The dense expert has what the others have.
        assert layer.experts.dropout == 0.25
        for part, factor in ((layer.experts, 0.5), (layer.gating, 2.0)):
            for weight in part.trainable_variables:
                assert rates[weight.path] == factor
    assert sorted(set(rates.values())) == [0.5, 1.0, 2.0]
    assert set(found) == {"encoder_moe", "decoder_moe"}


def test_bad_options_end_with_a_message(data_dir, tmp_path, capsys):
    for arguments, message in (
        (["--data-dir", str(tmp_path / "no")], "`data_dir` must be a folder"),
        (["--data-dir", str(data_dir), "--directions", "en-nl"], "en-nl"),
        (["--data-dir", str(data_dir), "--tfds", "wmt14_translate/de-en"], "wmt14"),
        (["--data-dir", str(data_dir), "--epochs", "0"], "epochs=0"),
        (["--data-dir", str(data_dir), "--steps-per-epoch", "0"], "steps_per_epoch=0"),
        (["--data-dir", str(data_dir), "--temperature", "0.5"], "temperature=0.5"),
        (["--data-dir", str(data_dir), "--vocabulary-size", "100"], "size=100"),
        (["--data-dir", str(data_dir), "--test-sentences", "0"], "test_sentences=0"),
        (
            ["--data-dir", str(data_dir), "--length-penalty", "nan"],
            "length_penalty=nan",
        ),
        (
            ["--data-dir", str(data_dir), "--vocabulary-size", "300", "--k", "99"],
            "k=99",
        ),
    ):
        folder = str(tmp_path / "out")
        assert main(["train-mt", "--output-dir", folder, *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not os.path.exists(folder)


@pytest.mark.parametrize(
    ("split", "steps_per_epoch"),
    [("train", None), ("train", 2), ("valid", 2), ("test", None)],
)
def test_pairs_that_are_all_too_long_are_refused_before_the_training(
    data_dir, tmp_path, split, steps_per_epoch
):
    long = tmp_path / "pairs"
    shutil.copytree(data_dir, long)
    lines = ("un " * 60 + "\t" + "one " * 60 + "\n") * 5
    for other in ("fr", "de"):
        (long / f"{split}.en-{other}.tsv").write_text(lines)
    options = small(long, tmp_path / "run", steps_per_epoch=steps_per_epoch)
    message = rf"{split} pairs through.*max_length=40; all 20 .* left out"
    with pytest.raises(ValueError, match=message):
        train_mt.run(options)
    assert not (tmp_path / "run").exists()


def test_pairs_left_out_are_counted_and_an_epoch_of_steps_needs_no_pass(
    data_dir, capsys, monkeypatch
):
    corpus = data.load_translation_corpus(data_dir)
    vocabulary = data.SubwordVocabulary.learn(
        corpus.texts(), 300, corpus.target_languages
    )
    sources, _ = corpus.pairs["train"]["en-fr"]
    sources[3] = sources[5] = "one " * 99  # serves fr-en too
    options = small(data_dir, "run")
    _, steps = pairs.epoch_batches(corpus, "train", vocabulary, options)
    assert "4 of 600 train pairs are left out" in capsys.readouterr().out
    assert steps > 2
    counted = []
    count = pairs._count
    monkeypatch.setattr(
        pairs, "_count", lambda dataset: counted.append(count(dataset)) or counted[-1]
    )
    monkeypatch.setattr(pairs, "_SAMPLED_PAIRS", 4)
    options = small(data_dir, "run", steps_per_epoch=2)
    _, steps = pairs.epoch_batches(corpus, "train", vocabulary, options)
    # 4 pairs of 4 directions, of which one is left out of en-fr and fr-en each.
    assert [kept for _, kept in counted] == [14]
    assert "2 of the first 16 train pairs are left out" in capsys.readouterr().out
    assert steps == 2
    # None of these fit, others do.
    monkeypatch.setattr(pairs, "_SAMPLED_PAIRS", 1)
    for name in ("en-fr", "en-de"):
        corpus.pairs["train"][name][0][0] = "one " * 99
    pairs.epoch_batches(corpus, "train", vocabulary, options)
    # Of 600 without rows 3 and 5 of two directions and row 0 of four.
    assert [kept for _, kept in counted[1:]] == [0, 592]


def test_a_direction_without_test_pairs_is_refused(data_dir):
    corpus = data.load_translation_corpus(data_dir)
    corpus.pairs["test"]["en-fr"] = ([], [])
    with pytest.raises(ValueError, match="0 pairs of 'en-fr'"):
        pairs.verify_pairs(corpus)


@pytest.mark.parametrize("content", [b"", b"x", "cut"])
def test_damaged_subwords_are_an_error_that_names_them(data_dir, tmp_path, content):
    corpus = data.load_translation_corpus(data_dir)
    options = small(data_dir, tmp_path)
    folders.prepare_folder(options, tmp_path)
    learned = data.SubwordVocabulary.learn(
        corpus.texts(), 300, corpus.target_languages
    ).model
    (tmp_path / "subwords.model").write_bytes(
        learned[: len(learned) // 2 + 3] if content == "cut" else content
    )
    with pytest.raises(ValueError, match=r"subwords\.model is damaged.*Delete it"):
        train_mt.run(options)


@pytest.mark.slow
def test_the_example_is_the_command():
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True
    )
    assert ran.returncode == 0
    assert "--temperature" in ran.stdout
