import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_moe
from keras_moe import data
from keras_moe.__main__ import main
from keras_moe.commands import folders, train_lm
from keras_moe.commands.options import TrainLMOptions

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Sentences in which every word tells the next: w3 w4 w5 ..."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for split, lines in (("train", 120), ("valid", 30), ("test", 30)):
        starts = rng.integers(0, 20, size=lines)
        text = [" ".join(WORDS[(s + i) % 20] for i in range(6)) for s in starts]
        (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
    return folder


def small(data_dir, folder, **changes):
    return TrainLMOptions(
        **{
            "data_dir": str(data_dir),
            "output_dir": str(folder),
            "min_count": 1,
            "num_experts": 4,
            "k": 2,
            "units": 16,
            "hidden_units": 16,
            "dropout": 0.0,
            "learning_rate": 0.03,
            "warmup_steps": 5,
            "batch_size": 8,
            "sequence_length": 7,
            "epochs": 3,
            "verbose": 0,
            **changes,
        }
    )


@pytest.mark.slow
def test_the_whole_job(data_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    report = train_lm.run(small(data_dir, folder, baseline=True))
    assert report["test_perplexity"] < 0.5 * report["unigram_test_perplexity"]
    assert report["baseline_test_perplexity"] < report["unigram_test_perplexity"]
    assert report["max_over_mean_load"] >= 1.0
    printed = capsys.readouterr().out
    for text in ("unigram", "max/mean", "Sampled", "model.keras", "Which experts"):
        assert text in printed
    last = printed.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"Test perplexity {report['test_perplexity']:.1f} with \d+ experts, "
        rf"{report['baseline_test_perplexity']:.1f} dense \(equal operations\)\.",
        last,
    )
    for name in ("loss.png", "expert_load.png", "vocabulary.tsv", "report.json"):
        assert (folder / name).stat().st_size > 0
    # The counts of a test text of 30 * 7 tokens, k=2 experts each.
    assert sum(report["expert_counts"]) == 30 * 7 * 2
    model = keras.saving.load_model(folder / "model.keras")
    tokens = np.array([[2, 3, 4], [3, 0, 0]], "int32")
    vocabulary = data.Vocabulary.load(folder / "vocabulary.tsv")
    line = " ".join(vocabulary.decode([3, 4]))
    # The SavedModel loads where this package cannot be imported.
    script = f"""
import sys
sys.modules["keras_moe"] = None
import numpy as np, tensorflow as tf, tensorflow_text
loaded = tf.saved_model.load({str(folder / "saved_model" / "1")!r})
outputs = loaded.signatures["serving_default"](inputs=tf.constant({tokens.tolist()}))
np.save({str(tmp_path / "logits.npy")!r}, outputs["outputs"].numpy())
scores = loaded.signatures["score"](text=tf.constant([{line!r}, ""]))
np.save({str(tmp_path / "scores.npy")!r}, scores["token_log_probs"].numpy())
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    model.stateful = False
    logits = model(tokens)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, atol=1e-5)
    shifted = model(np.array([[2, 3, 4], [2, 0, 0]], "int32"))
    targets = np.array([[3, 4, 2], [2, 0, 0]])  # every line ends with <eos>
    expected = tf.gather(tf.nn.log_softmax(shifted), targets, axis=-1, batch_dims=2)
    expected = np.where(targets == 0, 0.0, expected)
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-5)
    # The command exports again, with requests to warm up, ids instead of strings ...
    assert main(["export", "--run-dir", str(folder), "--warmup"]) == 0
    assert "saved_model/2" in capsys.readouterr().out
    second = folder / "saved_model" / "2" / "assets.extra"
    assert (second / "tf_serving_warmup_requests").stat().st_size > 0
    target = tmp_path / "ids"
    options = ["--ids", "--signatures", "score", "--version", "7"]
    arguments = ["--run-dir", str(folder), "--output-dir", str(target), *options]
    assert main(["export", *arguments]) == 0
    loaded = tf.saved_model.load(str(target / "7"))
    scores = loaded.signatures["score"](tf.constant([[3, 4, 2]]))["token_log_probs"]
    np.testing.assert_allclose(scores[0], expected[0], atol=1e-5)
    # ... and never over what is there.
    assert main(["export", *arguments]) == 2
    assert "exists" in capsys.readouterr().err


def test_an_export_of_nothing_is_refused(tmp_path, capsys):
    assert main(["export", "--run-dir", str(tmp_path)]) == 2
    assert "a finished train-lm or train-mt" in capsys.readouterr().err


class _Interrupt(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    data_dir, tmp_path, monkeypatch
):
    options = {"dropout": 0.2, "epochs": 3}
    whole = train_lm.run(small(data_dir, tmp_path / "whole", **options))
    interrupted = small(data_dir, tmp_path / "broken", **options)
    fit = keras.Model.fit

    def fit_until_interrupted(self, *args, callbacks, **kwargs):
        return fit(self, *args, callbacks=[*callbacks, _Interrupt()], **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_lm.run(interrupted)
    resumed = train_lm.run(interrupted)
    assert resumed["test_perplexity"] == pytest.approx(
        whole["test_perplexity"], rel=1e-5
    )
    history = (tmp_path / "broken" / "history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in history] == ["epoch", "0.0", "1.0", "2"]


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(data_dir, tmp_path, capsys):
    options = small(data_dir, tmp_path / "run", epochs=1)
    first = train_lm.run(options)
    again = train_lm.run(options)
    assert "holds a trained model" in capsys.readouterr().out
    assert again["test_perplexity"] == first["test_perplexity"]
    assert (tmp_path / "run" / "saved_model" / "2").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "variables", "floatx"),
    [
        ("float64", "float64", "float64"),
        ("mixed_bfloat16", "float32", "float32"),
    ],
)
def test_a_run_has_the_numbers_asked_for(
    data_dir, tmp_path, monkeypatch, dtype, variables, floatx
):
    during = []
    fit = keras.Model.fit

    def watched_fit(self, *args, **kwargs):
        slots = [v for v in self.optimizer.variables if v.path.endswith("momentum")]
        during.append(({v.dtype for v in slots}, keras.config.floatx()))
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", watched_fit)
    folder = tmp_path / "run"
    report = train_lm.run(small(data_dir, folder, epochs=2, dtype=dtype))
    assert during == [({variables}, floatx)]
    assert report["test_perplexity"] < report["unigram_test_perplexity"]
    # Nothing of it stays behind, and the files carry it with them.
    assert keras.config.dtype_policy().name == keras.config.floatx() == "float32"
    model = keras.saving.load_model(folder / "model.keras")
    assert model.dtype_policy.name == dtype
    assert {v.dtype for v in model.trainable_variables} == {variables}
    loaded = tf.saved_model.load(str(folder / "saved_model" / "1"))
    scores = loaded.signatures["score"](text=tf.constant(["w3 w4 w5"]))
    assert np.isfinite(scores["token_log_probs"]).all()


def test_other_numbers_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train-lm", "--dtype", "float8"])
    assert "--dtype" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"mixed_bfloat16. Received: dtype='float8'"):
        train_lm.run(TrainLMOptions(dtype="float8"))


def test_a_run_with_other_settings_is_refused(data_dir, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    options = small(data_dir, folder)
    (folder / "settings.json").write_text(json.dumps(options.settings()))
    other = small(data_dir, folder, units=32, k=1)
    with pytest.raises(ValueError, match="k: 2 there, 1 now, units: 16 there, 32 now"):
        train_lm.run(other)
    assert folder.exists()


def test_a_folder_of_other_files_is_refused_and_kept(data_dir, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        train_lm.run(small(data_dir, tmp_path, overwrite=True))
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 9}, r"k=9, num_experts=4"),
        ({"k": 0}, r"k=0"),
        ({"epochs": 0}, r"epochs=0"),
        ({"batch_size": 0}, r"batch_size=0"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0"),
        ({"learning_rate": float("inf")}, r"learning_rate=inf"),
        ({"dropout": 1.0}, r"dropout=1.0"),
        ({"expert_dropout": 1.0}, r"expert_dropout=1.0"),
        ({"expert_learning_rate": -0.5}, r"expert_learning_rate=-0.5"),
        ({"gate_learning_rate": float("nan")}, r"gate_learning_rate=nan"),
        ({"loss_weight": -1.0}, r"-1.0"),
        ({"seed": -1}, r"`seed`.*seed=-1"),
        ({"batch_size": 2000}, r"'train' text.*2000 tokens.*lower `batch_size`"),
        ({"preset": "4xlstm_512", "baseline": True}, r"preset='4xlstm_512'"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(
    data_dir, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        train_lm.run(small(data_dir, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_refused_options_delete_no_run(data_dir, tmp_path):
    folder = tmp_path / "run"
    folders.prepare_folder(small(data_dir, folder), folder)
    (folder / "model.keras").write_text("mine")
    with pytest.raises(ValueError, match="k=9"):
        train_lm.run(small(data_dir, folder, k=9, overwrite=True))
    assert (folder / "model.keras").read_text() == "mine"


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_text_that_is_too_short_is_refused_first(data_dir, tmp_path, split):
    short = tmp_path / "text"
    shutil.copytree(data_dir, short)
    (short / f"{split}.txt").write_text("w1 w2\n")
    message = rf"'{split}' text must have at least 8 tokens.*3 tokens"
    with pytest.raises(ValueError, match=message) as caught:
        train_lm.run(small(short, tmp_path / "run"))
    assert "batch_size" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_another_text(data_dir, tmp_path):
    folder = tmp_path / "run"
    options = small(data_dir, folder)
    folders.prepare_folder(options, folder)
    (folder / "history.csv").write_text("epoch\n")
    (folder / "vocabulary.tsv").write_text("<pad>\t0\n<unk>\t0\n<eos>\t1\n")
    with pytest.raises(ValueError, match=r"vocabulary\.tsv.*other words.*Bring back"):
        train_lm.run(options)


def test_options_of_the_mixture_and_of_the_learning_rate(data_dir, tmp_path):
    options = small(
        data_dir,
        tmp_path,
        gating="top_k",
        noise="0.5",
        num_groups=2,
        activation="linear",
        decay="cosine",
        shared_units=3,
        scaling_factor=4.0,
        loss_weight=0.25,
    )
    model = train_lm.build_model(options, 23, "moe", 105)
    [moe] = model.moe_layers
    assert isinstance(moe, keras_moe.layers.HierarchicalMoE)
    assert (moe.num_groups, moe.k) == (2, (2, 2))
    assert type(moe.primary_gating) is keras_moe.layers.TopKGating
    assert moe.noise_stddev == 0.5
    assert moe.activation is keras.activations.linear
    assert moe.importance_loss_weight == 0.25
    assert moe.shared_experts.layers[0].units == 3
    assert moe.primary_gating.scaling_factor == 4.0
    # 5 steps of rise to 0.03, then half a cosine over 100 to 0.
    rate = model.optimizer._learning_rate
    found = [float(rate(step)) for step in (0, 5, 55, 105)]
    np.testing.assert_allclose(found, [0.0, 0.03, 0.015, 0.0], atol=1e-9)
    dense = train_lm.build_model(options, 23, "moe_1_wide", 105)
    # As many operations as two experts in each of two groups, and the gates: a matrix
    # of 2 columns, and for each of 2 groups one with a column for each expert.
    gates = (2 + 2 * options.num_experts // 2) // 2
    hidden = 4 * options.hidden_units + 3 + gates
    assert dense.moe_layers[0].experts.hidden_units == hidden
    assert dense.moe_layers[0].activation is keras.activations.linear


@pytest.mark.parametrize("num_sampled", [None, 5])
def test_experts_and_gates_have_rates_and_dropout_of_their_own(
    data_dir, tmp_path, num_sampled
):
    changes = {"expert_dropout": 0.5, "expert_learning_rate": 0.25, "shared_units": 3}
    options = small(
        data_dir, tmp_path, num_sampled=num_sampled, gate_learning_rate=3.0, **changes
    )
    for num_groups, middle in ((None, "moe"), (2, "moe"), (None, "moe_1_wide")):
        options = dataclasses.replace(options, num_groups=num_groups)
        model = train_lm.build_model(options, 23, middle, 105)
        [moe] = model.moe_layers
        assert moe.experts.dropout == 0.5
        if middle == "moe":
            assert moe.shared_experts.layers[1].rate == 0.5
        found = dict(
            zip(
                (v.path for v in model.trainable_variables),
                model.optimizer._rate_factors,
                strict=True,
            )
        )
        assert len(found) == len(model.trainable_variables)
        for part, factor in ((moe.experts, 0.25), (moe.gating, 3.0)):
            paths = [v.path for v in part.trainable_variables]
            assert paths
            assert {found.pop(path) for path in paths} == {factor}
        assert set(found.values()) == {1.0}
        assert model.optimizer.untouched_rows == "decay"
        assert model.optimizer.factored == ()
    # There is neither an expert nor a gate.
    plain = train_lm.build_model(options, 23, "4xlstm", 105)
    assert not getattr(plain.optimizer, "learning_rate_factors", {})


def test_rows_that_a_step_does_not_read_can_be_left_alone(data_dir, tmp_path):
    for num_sampled, rows, kept in (
        (5, "keep", "keep"),
        (None, "keep", "decay"),
        (5, "decay", "decay"),
    ):
        options = small(
            data_dir, tmp_path, num_sampled=num_sampled, untouched_rows=rows
        )
        model = train_lm.build_model(options, 23, "moe", 105)
        assert model.optimizer.untouched_rows == kept
        # Adam for every weight.
        assert model.optimizer.factored == ()


def test_several_mixtures_and_their_dense_twins(data_dir, tmp_path):
    options = small(data_dir, tmp_path, num_mixtures=2, noise="learned")
    model = train_lm.build_model(options, 23, "moe", 105)
    assert [moe.name for moe in model.moe_layers] == ["moe", "moe_2"]
    assert model.moe_layers[1].num_experts == options.num_experts
    dense = train_lm.build_model(options, 23, "moe_1_wide", 105)
    assert [moe.name for moe in dense.moe_layers] == ["moe_1_wide", "moe_1_wide_2"]
    hidden = {moe.experts.hidden_units for moe in dense.moe_layers}
    # The gate's two matrices cost what so many hidden units with two weights each do.
    assert hidden == {options.k * options.hidden_units + options.num_experts}
    alone = dataclasses.replace(options, middle="moe_1_wide", num_mixtures=1)
    [one] = train_lm.build_model(alone, 23, "moe_1_wide", 105).moe_layers
    assert one.experts.hidden_units == options.k * options.hidden_units
    with pytest.raises(ValueError, match="num_mixtures=0"):
        train_lm.run(small(data_dir, tmp_path, num_mixtures=0))


def test_gates_have_little_noise_unless_it_is_learned(data_dir, tmp_path):
    found = [
        train_lm.build_model(small(data_dir, tmp_path, **changes), 23, "moe", 105)
        .moe_layers[0]
        .gating.noise_stddev
        for changes in ({}, {"noise": "learned"}, {"noise": "0.5"})
    ]
    assert found == [0.2, "learned", 0.5]
    options = small(data_dir, tmp_path, num_groups=2)
    [moe] = train_lm.build_model(options, 23, "moe", 105).moe_layers
    assert moe.noise_stddev == "learned"
    options = small(data_dir, tmp_path, gating="loss_free")
    train_lm.build_model(options, 23, "moe", 105)
    # Without a matrix for the noise a dense twin has less to make up for.
    options = small(data_dir, tmp_path)
    [dense] = train_lm.build_model(options, 23, "moe_1_wide", 105).moe_layers
    hidden = options.k * options.hidden_units + options.num_experts // 2
    assert dense.experts.hidden_units == hidden


def test_training_text_can_be_cut(data_dir, tmp_path):
    whole, cut = (
        train_lm._corpus(small(data_dir, tmp_path, tokens=tokens))
        for tokens in (None, 100)
    )
    np.testing.assert_array_equal(cut.train, whole.train[:100])
    assert cut.vocabulary == whole.vocabulary
    for changes, message in (
        ({"tokens": 0}, "tokens=0"),
        ({"activation": "no such"}, "activation='no such'"),
        ({"noise": "loud"}, "noise='loud'"),
        ({"gating": "switch"}, "k=2"),
    ):
        options = small(data_dir, tmp_path / "a", **changes)
        with pytest.raises(ValueError, match=message):
            train_lm.run(options)
    assert not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def exported_run(tmp_path_factory):
    """A model and what `export` reads beside it."""
    folder = tmp_path_factory.mktemp("export")
    options = small("text", folder)
    vocabulary = data.Vocabulary.from_tokens([WORDS])
    model = train_lm.build_model(options, len(vocabulary), "moe", 10)
    folders.prepare_folder(options, folder)
    folders.save_model(model, folder)
    vocabulary.save(folder / "vocabulary.tsv")
    return folder


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("model.keras", lambda b: b"x", "no .keras file"),
        ("model.keras", lambda b: b"", "no .keras file"),
        ("model.keras", lambda b: b[: len(b) // 2], "no .keras file"),
        ("model.keras", lambda b: b[:300] + bytes(9) + b[309:], "model.keras"),
        ("vocabulary.tsv", lambda b: b[:-2], "in line 23"),
        ("vocabulary.tsv", lambda b: b"\n".join(b.splitlines()[:9]) + b"\n", "9 tok"),
        ("vocabulary.tsv", lambda b: b"\xff\xfe" + b, "UnicodeDecodeError"),
        ("vocabulary.tsv", lambda b: b"", "must begin with"),
        ("settings.json", lambda b: b[:-9], "JSONDecodeError"),
        ("settings.json", lambda b: b"{}", "no tokenizer"),
        ("settings.json", lambda b: b'{"tokenizer": 7}', "no tokenizer"),
        ("settings.json", None, "missing"),
    ],
)
def test_an_export_names_the_file_that_is_damaged(
    exported_run, tmp_path, capsys, name, change, reason
):
    folder = tmp_path / "run"
    shutil.copytree(exported_run, folder)
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(content))
    assert main(["export", "--run-dir", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"{path} is damaged" in error
    assert reason in error
    assert not (folder / "saved_model").exists()


def test_an_export_to_a_file_is_refused(exported_run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    arguments = ["--run-dir", str(exported_run), "--output-dir"]
    assert main(["export", *arguments, str(tmp_path / "file")]) == 2
    assert "`output_dir` must be a folder" in capsys.readouterr().err


def test_errors_are_one_line_on_the_command_line(tmp_path, capsys):
    status = main(["train-lm", "--data-dir", str(tmp_path / "nowhere")])
    assert status == 2
    assert "error: `data_dir` must be a folder" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train-lm", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name in ("--data-dir", "--num-experts", "--baseline", "--overwrite"):
        assert name in printed
    assert "None" not in printed


@pytest.mark.parametrize("command", ["train-lm", "train-mt", "export"])
def test_every_command_says_what_it_does(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    text = printed.split("\n\n")[1]
    assert text.startswith(("train a", "export a"))
    assert "(default: False)" not in printed


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"keras_moe {keras_moe.__version__}\n"


@pytest.mark.parametrize(
    ("command", "resumes"),
    [("train-lm", True), ("train-mt", True), ("export", False), ("plan", False)],
)
def test_an_interruption_says_whether_the_command_goes_on(
    command, resumes, monkeypatch, capsys
):
    def interrupt(options):
        raise KeyboardInterrupt

    module = importlib.import_module(f"keras_moe.commands.{command.replace('-', '_')}")
    monkeypatch.setattr(module, "run", interrupt)
    assert main([command]) == 130
    assert ("goes on from the last" in capsys.readouterr().err) == resumes
