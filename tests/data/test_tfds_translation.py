"""The real builders of tensorflow-datasets, over files made here."""

import sys
from unittest import mock

import pytest

from keras_moe import data

tfds = pytest.importorskip("tensorflow_datasets")

ROWS = {
    "train": [("A cat.", "Un chat."), ("Two\n dogs.", "Deux chiens.")],
    "validation": [("No.", "Non.")],
    "test": [("Yes.", "Oui.")],
}


def prepare(name, tmp_path, monkeypatch, examples):
    """Writes the files of a dataset with its own builder; only the download is ours."""
    builder = tfds.builder(name, data_dir=tmp_path, try_gcs=False)
    # The writer asks whether an example comes from Beam, which need not be installed.
    beam = mock.MagicMock()
    beam.PTransform = beam.PCollection = type("Never", (), {})
    monkeypatch.setitem(sys.modules, "apache_beam", beam)

    def generators(self, manager, pipeline=None):
        return {split: self._generate_examples(split) for split in ROWS}

    def generate(self, split):
        yield from enumerate(examples(split))

    monkeypatch.setattr(type(builder), "_split_generators", generators)
    monkeypatch.setattr(type(builder), "_generate_examples", generate)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


@pytest.mark.slow
def test_wmt14(tmp_path, monkeypatch):
    name = "wmt14_translate/fr-en"
    prepare(
        name,
        tmp_path,
        monkeypatch,
        lambda split: [{"en": en, "fr": fr} for en, fr in ROWS[split]],
    )
    corpus = data.load_tfds_translation(name, data_dir=tmp_path)
    assert set(corpus.directions) == {"en-fr", "fr-en"}
    pairs = set(zip(*corpus.pairs["train"]["en-fr"], strict=True))
    assert pairs == {("A cat.", "Un chat."), ("Two dogs.", "Deux chiens.")}
    assert corpus.pairs["valid"]["fr-en"] == (["Non."], ["No."])
    one = data.load_tfds_translation(name, data_dir=tmp_path, max_pairs=1)
    assert len(one.pairs["train"]["en-fr"][0]) == 1
    vocabulary = data.SubwordVocabulary.learn(
        [*corpus.texts()] * 5, 330, corpus.target_languages
    )
    batches = corpus.dataset("train", vocabulary, batch_tokens=64)
    assert sum(len(targets) for _, targets in batches) == 4


@pytest.mark.slow
def test_ted_multi(tmp_path, monkeypatch):
    def examples(split):
        for number, (en, fr) in enumerate(ROWS[split]):
            translations = {"en": en, "fr": fr, "pt-br": f"pt {number}"}
            if split == "train" and number == 1:
                del translations["fr"]
            yield {"translations": translations, "talk_name": f"talk {number}"}

    prepare("ted_multi_translate", tmp_path, monkeypatch, examples)
    load = data.load_tfds_translation
    corpus = load(
        "ted_multi_translate", data_dir=tmp_path, directions=["en-fr", "pt_br-en"]
    )
    assert corpus.target_languages == ("fr", "en")
    # The second talk has no French.
    assert corpus.pairs["train"]["en-fr"] == (["A cat."], ["Un chat."])
    assert set(corpus.pairs["train"]["pt_br-en"][0]) == {"pt 0", "pt 1"}
    with pytest.raises(ValueError, match="directions=None"):
        load("ted_multi_translate", data_dir=tmp_path)
    with pytest.raises(ValueError, match="en-xx"):
        load("ted_multi_translate", data_dir=tmp_path, directions=["en-xx"])


def test_a_dataset_that_is_not_prepared_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"wmt14_translate/de-en.*download=True"
    ):
        data.load_tfds_translation("wmt14_translate/de-en", data_dir=tmp_path)
