"""The sweep: its arms, what is recorded of them, and the tables made of it."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "paper"))


@pytest.fixture
def language_arm():
    import sweep_language

    return sweep_language.LanguageModelArm(
        tokens=3_000,
        vocabulary_size=200,
        units=16,
        hidden_units=16,
        num_experts=8,
        batch_size=8,
        num_sampled=None,  # TensorFlow's sampler begins anew in another process
        points=3,
        validation_tokens=1_100,
        test_tokens=1_100,
    )


@pytest.mark.slow
def test_a_language_model_goes_on_where_it_was_cut(language_arm, monkeypatch, tmp_path):
    import sweep_language

    corpus = sweep_language.data.load_text_corpus(vocabulary_size=200)
    whole = language_arm.run(tmp_path / "whole", corpus, with_test=True)
    assert [p["tokens"] for p in whole["curve"]] == [1_024, 1_792, 2_816]
    evaluate = sweep_language.evaluate

    def cut(model, tokens, corpus):
        if sweep_language.runs.checkpoints(tmp_path / "cut"):
            raise KeyboardInterrupt
        return evaluate(model, tokens, corpus)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_language, "evaluate", cut)
        with pytest.raises(KeyboardInterrupt):
            language_arm.run(tmp_path / "cut", corpus, with_test=True)
    again = language_arm.run(tmp_path / "cut", corpus, with_test=True)
    for name in ("perplexity", "test_perplexity"):
        assert again[name] == pytest.approx(whole[name], rel=1e-5)
    for mine, other in zip(again["curve"], whole["curve"], strict=True):
        assert mine["tokens"] == other["tokens"]
        assert mine["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_a_text_with_less_tokens_begins_again(language_arm, monkeypatch, tmp_path):
    import sweep_language

    corpus = sweep_language.data.load_text_corpus(vocabulary_size=200)
    corpus = dataclasses.replace(corpus, train=corpus.train[:1_024])
    shown, fit = [], keras.Model.fit

    def fit_and_keep(model, stream, **options):
        shown.extend(tokens.numpy() for tokens, *_ in stream)
        return fit(model, stream, **options)

    monkeypatch.setattr(keras.Model, "fit", fit_and_keep)
    found = language_arm.run(tmp_path, corpus, with_test=False)
    assert [p["tokens"] for p in found["curve"]] == [1_024, 1_792, 2_816]
    # A pass has 4 steps of 8 x 32 tokens, and there are 11.
    assert len(shown) == 11
    for step, tokens in enumerate(shown):
        np.testing.assert_array_equal(tokens, shown[step % 4])


def test_twins_of_the_sweep_have_equal_operations():
    import sweep_language as sweep
    from sweep_report import overtaking

    for name in ("moe_4", "moe_64", "moe_256", "hierarchical_256"):
        mixture = sweep.arm_of(name, {})
        for kind in ("dense", "deep"):
            dense = sweep.twin(mixture, kind)
            wanted = mixture.count().core_operations
            assert dense.count().core_operations == pytest.approx(wanted, rel=0.005)
    # 2 LSTMs of 8 d^2, k experts of 2 d h, a gate with noise of 2 d E.
    assert sweep.arm_of("moe_64", {}).count().core_operations == (
        2 * 8 * 128**2 + 4 * 2 * 128 * 256 + 2 * 128 * 64
    )
    curves = [np.array([10, 20, 30])] * 2
    for values, expected in (
        ([3, 1, 1], "20"),
        ([1, 3, 3], "never"),
        ([1, 1, 1], "10"),
    ):
        other = curves[0], np.array([2, 2, 2])
        assert overtaking((curves[0], np.array(values)), other) == expected


WORDS = {
    "en": ["one", "two", "six", "ten", "red", "sun"],
    "fr": ["un", "deux", "six", "dix", "rouge", "soleil"],
}


@pytest.fixture(scope="module")
def pair_folders(tmp_path_factory):
    """Two folders of sentences that are translated word by word."""
    rng, folders = np.random.default_rng(0), []
    for name, longest in (("short", 4), ("long", 12)):
        folder = tmp_path_factory.mktemp("pairs") / name
        folder.mkdir()
        for split, rows in (("train", 90), ("valid", 12), ("test", 8)):
            lines = []
            for _ in range(rows):
                ids = rng.integers(0, 6, size=rng.integers(1, longest))
                sides = [" ".join(WORDS[n][i] for i in ids) for n in ("en", "fr")]
                lines.append("\t".join(sides) + "\n")
            (folder / f"{split}.en-fr.tsv").write_text("".join(lines))
        folders.append(folder)
    return folders


@pytest.fixture
def translation_arm():
    import sweep_translation

    return sweep_translation.arm_of(
        "decoder_moe_4",
        {
            "vocabulary_size": 300,
            "directions": "en-fr",
            "steps": 9,
            "points": 3,
            "units": 16,
            "hidden_units": 16,
            "batch_tokens": 128,
            "max_length": 64,
            "expert_dropout": 0.1,
            "gate_learning_rate": 2.0,
            "warmup_steps": 3,
            "validation_pairs": 10,
            "sentences": 2,
            "test_sentences": 3,
            "num_beams": 2,
            "longest": 8,
        },
    )


def pairs_of(folders, arm, work):
    import sweep_translation

    options = SimpleNamespace(data_dir=folders, work=work)
    return sweep_translation.read_corpus(options, arm)


def test_folders_of_pairs_are_one_training_set_and_apart_in_tests(
    pair_folders, translation_arm, tmp_path
):
    arm = dataclasses.replace(translation_arm, directions="en-fr,fr-en")
    found = pairs_of(pair_folders, arm, tmp_path)
    sources, targets = found.train.pairs["train"]["en-fr"]
    assert len(sources) == len(targets) == 180
    assert found.train.pairs["train"]["fr-en"][0] is targets
    lines = (pair_folders[1] / "train.en-fr.tsv").read_text().splitlines()
    assert [f"{s}\t{t}" for s, t in zip(sources, targets, strict=True)][90:] == lines
    names = ["short en-fr", "short fr-en", "long en-fr", "long fr-en"]
    assert list(found.sets) == names
    direction, held_out = found.sets["long fr-en"]
    assert direction == "fr-en"
    assert {split: len(sides[0]) for split, sides in held_out.items()} == {
        "valid": 12,
        "test": 8,
    }
    # One folder: sets have the names of the directions.
    alone = pairs_of(pair_folders[:1], arm, tmp_path / "alone")
    assert list(alone.sets) == ["en-fr", "fr-en"]


def test_sets_are_judged_by_whole_whatever_training_draws(
    pair_folders, translation_arm, tmp_path
):
    import sweep_translation as sweep

    changes = {"temperature": 5.0, "max_length": 4}
    arm = dataclasses.replace(translation_arm, **changes)
    corpus = pairs_of(pair_folders, arm, tmp_path)
    for split, most, expected in (("valid", 10, 10), ("test", None, 8)):
        sets = sweep.Sets(arm, corpus, split, most)
        for batches in sets.batches.values():
            # None is too long, none is drawn twice.
            assert sum(len(targets) for _, targets in batches) == expected


@pytest.mark.slow
def test_a_translation_model_goes_on_where_it_was_cut(
    pair_folders, translation_arm, monkeypatch, tmp_path
):
    import sweep_translation

    corpus = pairs_of(pair_folders, translation_arm, tmp_path)
    whole = translation_arm.run(tmp_path / "whole", corpus, with_test=True)
    assert [p["steps"] for p in whole["curve"]] == [3, 6, 9]
    assert set(whole["test"]) == {"short en-fr", "long en-fr"}
    for scores in whole["test"].values():
        assert scores["sentences"] == 3
        assert "tok:13a" in scores["bleu_signature"]
    bleus = [scores["bleu"] for scores in whole["test"].values()]
    assert whole["test_bleu"] == pytest.approx(np.mean(bleus))
    sets = [scores["perplexity"] for scores in whole["test"].values()]
    assert min(sets) < whole["test_perplexity"] < max(sets)
    # What was shown is counted, batch by batch.
    keras.utils.set_random_seed(1)
    sizes = {"batch_tokens": 128, "max_length": 64, "seed": 1}
    batches = corpus.train.dataset("train", corpus.vocabulary, **sizes)
    shown = [targets.numpy() for _, targets in batches.repeat().take(9)]
    assert whole["curve"][-1]["pairs"] == sum(map(len, shown))
    assert whole["curve"][-1]["tokens"] == sum(map(np.count_nonzero, shown))
    scores = sweep_translation.Sets.scores

    def cut(*arguments, **options):
        if sweep_translation.runs.checkpoints(tmp_path / "cut"):
            raise KeyboardInterrupt
        return scores(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_translation.Sets, "scores", cut)
        with pytest.raises(KeyboardInterrupt):
            translation_arm.run(tmp_path / "cut", corpus, with_test=True)
    again = translation_arm.run(tmp_path / "cut", corpus, with_test=True)
    for name in ("perplexity", "test_perplexity", "bleu", "test_bleu"):
        assert again[name] == pytest.approx(whole[name], rel=1e-5)
    for mine, other in zip(again["curve"], whole["curve"], strict=True):
        for name in ("steps", "pairs", "tokens"):
            assert mine[name] == other[name]
        assert mine["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
        load = "decoder_moe_max_over_mean_load"
        assert mine[load] == pytest.approx(other[load])


@pytest.mark.parametrize(
    "common", [{}, {"shared_units": 384, "k": 1}, {"gating": "top_k", "units": 96}]
)
def test_twins_of_translation_models_have_equal_operations(common):
    import sweep_translation as sweep

    mixture = sweep.arm_of("moe_32", common)
    wanted = mixture.count().core_operations
    for name in ("dense_32", "encoder_moe_32", "decoder_moe_32"):
        found = sweep.arm_of(name, common).count().core_operations
        assert found == pytest.approx(wanted, rel=0.001)
    if not common:
        # 4 LSTMs of 8 d^2 and one of 12 d^2; of each side k experts of 2 d h, and a
        # gate with noise of 2 d E.
        assert wanted == (44 * 192**2 + 2 * (2 * 2 * 192 * 384) + 2 * (2 * 192 * 32))


@pytest.mark.parametrize("name", ["moe_4", "encoder_moe_4", "dense_4"])
def test_the_count_is_that_of_the_translation_model_that_is_trained(
    name, pair_folders, translation_arm, tmp_path
):
    import sweep_translation as sweep

    settings = {"vocabulary_size": 300, "units": 8, "hidden_units": 16}
    settings |= {"directions": "en-fr", "shared_units": 8}
    arm = sweep.arm_of(name, settings)
    vocabulary = pairs_of(pair_folders, translation_arm, tmp_path).vocabulary
    model = arm.build(vocabulary)
    found = sum(
        int(np.prod(w.shape))
        for w in model.trainable_weights
        # The gate of one expert, which is constantly 1, is not counted.
        if "bias" not in w.path and "softmax_gating" not in w.path
    )
    counted = dataclasses.replace(arm, vocabulary_size=len(vocabulary)).count()
    assert found == counted.total_parameters
    mixtures = {m.name for m in model.moe_layers if m.num_experts > 1}
    assert (
        mixtures
        == {
            "moe_4": {"encoder_moe", "decoder_moe"},
            "encoder_moe_4": {"encoder_moe"},
            "dense_4": set(),
        }[name]
    )


def test_records_and_folders_from_before_a_setting_are_found(tmp_path):
    import experiment
    import sweep

    arm = sweep.sweep_language.arm_of("moe_64", {"untouched_rows": "keep"})
    new = experiment.BEFORE["LanguageModelArm"]
    old = {k: v for k, v in dataclasses.asdict(arm).items() if k not in new}
    assert len(old) == len(dataclasses.asdict(arm)) - len(new)
    path = tmp_path / "records.jsonl"
    record = {"arm": {"kind": "LanguageModelArm", **old}, "results": {"perplexity": 7}}
    path.write_text(json.dumps(record) + "\n")
    records = experiment.Records(path)
    assert records.known(arm)["results"] == {"perplexity": 7}
    changed = dataclasses.replace(arm, gate_learning_rate=2.0)
    assert records.known(changed) is None
    assert sweep.key_of(arm) == "moe_64_" + DIGEST
    assert sweep.key_of(changed) != sweep.key_of(arm)
    # What only the test goes by does not train an arm again.
    translation = sweep.sweep_translation.arm_of("moe_32", {})
    more = dataclasses.replace(translation, num_beams=8)
    assert sweep.key_of(translation) == sweep.key_of(more)
    longer = dataclasses.replace(translation, steps=9)
    assert sweep.key_of(translation) != sweep.key_of(longer)


def test_operations_of_several_mixtures_are_counted():
    import sweep_language

    one, two = (
        sweep_language.arm_of("moe_64", {"num_mixtures": n}).count() for n in (1, 2)
    )
    lstm = one.operations["lstm"]
    assert two.core_operations - lstm == 2 * (one.core_operations - lstm) > 0
    lstm = one.parameters["lstm"]
    assert two.core_parameters - lstm == 2 * (one.core_parameters - lstm) > 0
    dense = sweep_language.arm_of("dense_64", {"num_mixtures": 2})
    assert dense.num_mixtures == 2
    found = dense.count().core_operations
    assert abs(found / two.core_operations - 1) < 0.005


# Of the settings of `moe_64` as they were before there were more.
DIGEST = "58ad974c6683"


def results(perplexities, **more):
    curve = [
        {"tokens": 1_000 * (i + 1), "perplexity": p} for i, p in enumerate(perplexities)
    ]
    more = {"operations": 500, "parameters": 9_000, **more}
    last = curve[-1]["perplexity"]
    return {"curve": curve, "perplexity": last, "training_cpu_seconds": 60.0, **more}


@pytest.fixture
def recorded(tmp_path):
    """Two seeds of a mixture, its dense twin, and a twin with another rate."""
    import experiment
    import sweep_language as sweep

    records = experiment.Records(tmp_path / "records.jsonl")
    common = {"tokens": 2_000, "points": 2, "corpus": "short"}
    for name, changes, perplexities in (
        ("moe_8", {}, (50.0, 20.0)),
        ("moe_8", {"seed": 1}, (40.0, 22.0)),
        ("dense_8", {}, (40.0, 30.0)),
        ("dense_8", {"learning_rate": 0.002}, (60.0, 40.0)),
    ):
        arm = sweep.arm_of(name, {**common, **changes})
        found = results(perplexities)
        if name == "moe_8":
            figures = {"moe_load_cv": 0.25, "moe_max_over_mean_load": 1.5}
            figures["training_moe_choices_kept"] = 0.75
            found["curve"][-1] |= figures
            found["test_perplexity"] = 22.0 + 4.0 * arm.seed
        elif arm.learning_rate == 0.004:
            found["test_perplexity"] = 40.0
        records.keep(arm, found, name=name)
    return records


def test_a_mixture_is_compared_with_dense_models_of_as_many_operations():
    import sweep_report

    def row(name, operations, perplexity):
        is_mixture = name.startswith("moe")
        made = sweep_report.Row(name, {"middle": "moe" if is_mixture else "dense"})
        made.found.append(results((perplexity,), operations=operations))
        return made

    rows = [row("moe_8", 1000, 20.0), row("near", 1015, 30.0), row("wide", 1025, 10.0)]
    assert sweep_report.best_twin(rows[0], rows).name == "near"
    assert sweep_report.best_twin(rows[0], rows[::2]) is None
    assert "| 33.3% |" in sweep_report.at_the_end(rows)


TABLES = """short, vocabulary of 32,000, 2,000 tokens:

| arm | seeds | operations | parameters | validation | test | fewer than dense | on test text | overtakes at | CPU seconds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| moe_8 | 2 | 500 | 9,000 | 21.00 (sd 1.00) | 24.00 (sd 2.00) | 30.0% | 40.0% | 2,000 | 60 |
| dense_8 [learning_rate=0.004] | 1 | 500 | 9,000 | 30.00 | 40.00 | 0.0% | 0.0% |  | 60 |
| dense_8 [learning_rate=0.002] | 1 | 500 | 9,000 | 40.00 |  | -33.3% |  |  | 60 |

| tokens | moe_8 | dense_8 [learning_rate=0.004] | dense_8 [learning_rate=0.002] |
| --- | --- | --- | --- |
| 1,000 | 45.00 | 40.00 | 60.00 |
| 2,000 | 21.00 | 30.00 | 40.00 |

| arm | layer | choices kept | max/mean load | load CV |
| --- | --- | --- | --- | --- |
| moe_8 | moe | 75% | 1.50 | 0.25 |"""  # noqa: E501


def test_tables_and_pictures_are_made_of_records_alone(
    recorded, monkeypatch, tmp_path, capsys
):
    import sweep

    picture = tmp_path / "pictures" / "sweep.png"
    arguments = ["--report", str(recorded.path), "--picture", str(picture)]
    monkeypatch.setattr(sweep.sys, "argv", ["sweep.py", *arguments])
    sweep.main()
    printed = capsys.readouterr().out
    # 21 is 30 % less than 30, in the mean of both seeds.
    assert printed.strip() == f"{TABLES}\n\nPicture: {picture}"
    assert picture.stat().st_size > 1_000
    monkeypatch.setattr(sweep.sys, "argv", ["sweep.py", "--report", "nothing"])
    with pytest.raises(SystemExit, match="`--report` must be a file"):
        sweep.main()


def test_tables_of_translations_have_every_test_set(tmp_path):
    import experiment
    import sweep_report
    import sweep_translation as sweep

    records = experiment.Records(tmp_path / "records.jsonl")
    common = {"steps": 20, "points": 2, "corpus": "short+long"}
    for name, seed, bleu in (
        ("dense_8", 0, 10.0),
        ("decoder_moe_8", 0, 20.0),
        ("decoder_moe_8", 1, 30.0),
    ):
        found = results((50.0, 20.0), bleu=bleu - 1, test_bleu=bleu)
        for point in found["curve"]:
            point["pairs"] = point["tokens"] // 10
        found["test_perplexity"] = 21.0
        found["test"] = {
            title: {
                "bleu": bleu + more,
                "perplexity": 21.0 - more,
                "sentences": 1_640,
                "bleu_signature": f"tok:{split}",
            }
            for title, more, split in (
                ("short en-fr", 5, "13a"),
                ("long en-fr", -5, "char"),
            )
        }
        arm = sweep.arm_of(name, {**common, "seed": seed})
        records.keep(arm, found, name=name)
    printed = sweep_report.tables(records.all())
    for line in (
        "short+long, vocabulary of 8,000, 20 steps:",
        "| decoder_moe_8 | 2 | 500 | 9,000 | 20.00 (sd 0.00) | 21.00 (sd 0.00) | 0.0% "
        "| 0.0% | never | 24.0 | 25.0 | 60 |",
        "| 2,000 | 200 | 20.00 | 20.00 |",
        "| short en-fr | 1,640 | 15.0 (16.00) | 30.0 (16.00) |",
        "| long en-fr | 1,640 | 5.0 (26.00) | 20.0 (26.00) |",
        "| mean BLEU (perplexity of all) |  | 10.0 (21.00) | 25.0 (21.00) |",
        "Signatures: `BLEU|tok:13a`, `BLEU|tok:char`.",
    ):
        assert line in printed.splitlines()


# In a document: what `sweep.py --report` prints of a file beside it, between marks.
MARKS = re.compile(r"<!-- tables of (\S+) -->\n+(.*?)\n+<!-- end of tables -->", re.S)


def documented(folder):
    """Tables that documents of a folder have, beside those of the records."""
    import experiment
    import sweep_report

    for path in sorted(folder.glob("*.md")):
        for name, text in MARKS.findall(path.read_text()):
            records = experiment.Records(folder / name)
            yield path.name, text, sweep_report.tables(records.all())


def test_tables_of_documents_are_those_of_their_records(recorded, tmp_path):
    text = f"# Record\n\n<!-- tables of records.jsonl -->\n\n{TABLES}\n\n"
    (tmp_path / "record.md").write_text(text + "<!-- end of tables -->\n\nMore.\n")
    [(name, mine, made)] = documented(tmp_path)
    assert (name, mine) == ("record.md", made)
    (tmp_path / "record.md").write_text(
        text.replace("30.0%", "31.0%") + "<!-- end of tables -->\n"
    )
    [(_, mine, made)] = documented(tmp_path)
    assert mine != made
    for name, mine, made in documented(ROOT / "docs" / "experiments"):
        assert mine == made, f"{name}: write what sweep.py --report prints"
