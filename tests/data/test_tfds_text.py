"""lm1b through its real builder, from an archive in the real layout made here."""

import hashlib
import io
import sys
import tarfile
from collections import Counter
from unittest import mock

import numpy as np
import pytest

from keras_moe import data
from keras_moe.commands import train_lm
from keras_moe.commands.options import TrainLMOptions
from keras_moe.data import tfds_text

tfds = pytest.importorskip("tensorflow_datasets")

TOP = "1-billion-word-language-modeling-benchmark-r13output"
NAME = f"{TOP}.tar.gz"
WORDS = [f"w{i}" for i in range(20)]


def sentences(number, seed):
    """Each word tells the next; a rare word in every seventh sentence."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        start, length = rng.integers(0, 20), rng.integers(3, 9)
        words = [WORDS[(start + j) % 20] for j in range(length)]
        yield " ".join(words + ([f"rare{seed}_{i}"] if i % 7 == 0 else []))


FILES = {
    f"training-monolingual.tokenized.shuffled/news.en-0000{i}-of-00100": list(
        sentences(60, i)
    )
    for i in (1, 2)
} | {
    f"heldout-monolingual.tokenized.shuffled/news.en.heldout-0000{i}-of-00050": list(
        sentences(50, 10 + i)
    )
    for i in (0, 1)
}
TRAIN = [line for name, lines in FILES.items() if "training" in name for line in lines]


def write_archive(folder):
    path = folder / NAME
    with tarfile.open(path, "w:gz") as archive:
        for name, lines in FILES.items():
            content = "".join(f"{line}\n" for line in lines).encode()
            member = tarfile.TarInfo(f"{TOP}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The dataset as the builder writes it. Only the checksum it expects is ours."""
    folder = tmp_path_factory.mktemp("lm1b")
    archive = write_archive(folder)
    builder = tfds.builder("lm1b", data_dir=folder, try_gcs=False)
    (url,) = builder.url_infos
    content = archive.read_bytes()
    kind = type(next(iter(builder.url_infos.values())))
    info = kind(
        size=tfds.core.utils.Size(len(content)),
        checksum=hashlib.sha256(content).hexdigest(),
        filename=NAME,
    )
    beam = mock.MagicMock()  # the writer asks whether an example comes from Beam
    beam.PTransform = beam.PCollection = type("Never", (), {})
    with (
        mock.patch.object(type(builder), "url_infos", {url: info}),
        mock.patch.dict(sys.modules, {"apache_beam": beam}),
    ):
        data.prepare_lm1b(archive, data_dir=folder)
    return folder


def load(data_dir, **options):
    return data.load_tfds_text(
        data_dir=data_dir,
        **{"valid_split": "test[:50%]", "test_split": "test[50%:]", **options},
    )


def counted():
    counts = Counter(word for line in TRAIN for word in line.split())
    counts["<eos>"] = len(TRAIN)
    return counts


@pytest.mark.slow
def test_counts_and_vocabulary_are_those_of_the_files(data_dir):
    corpus = load(data_dir)
    counts = counted()
    assert corpus.num_tokens("train") == sum(counts.values())
    # Words of three occurrences or more, and the three marks.
    kept = {w for w, n in counts.items() if n >= 3} - {"<eos>"}
    assert set(corpus.vocabulary.tokens) == kept | {"<pad>", "<unk>", "<eos>"}
    assert corpus.vocabulary.counts[2] == 120
    held = [w for n, lines in FILES.items() if "heldout" in n for w in lines]
    tokens = sum(len(line.split()) + 1 for line in held)
    assert corpus.valid.size + corpus.test.size == tokens
    again = load(data_dir, vocabulary=corpus.vocabulary)
    assert again.num_tokens("train") == sum(counts.values())
    assert len(load(data_dir, vocabulary_size=10).vocabulary) == 10


def rows_of(dataset):
    """For each row its inputs and its targets, padding left out."""
    batches = list(dataset.as_numpy_iterator())
    parts = zip(*batches, strict=True)
    tokens, targets, weights = (np.concatenate(p, axis=1) for p in parts)
    rows = zip(tokens, targets, weights, strict=True)
    return [(t[w > 0], y[w > 0]) for t, y, w in rows]


def texts(rows, vocabulary):
    lines = Counter()
    for _, targets in rows:
        text = " ".join(vocabulary.decode(targets))
        lines.update(line.strip() for line in text.split("<eos>")[:-1])
        assert targets.size == 0 or targets[-1] == 2
    return lines


@pytest.mark.slow
def test_every_sentence_is_in_one_row_once(data_dir):
    corpus = load(data_dir, min_count=1)
    for shape in ((3, 5), (8, 7)):
        rows = rows_of(corpus.dataset("train", *shape))
        for tokens, targets in rows:  # a token is the target before it
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            assert tokens[0] == 2
        assert texts(rows, corpus.vocabulary) == Counter(TRAIN)
    assert corpus.dataset("train", 3, 5).element_spec[0].shape == (3, 5)


@pytest.mark.slow
def test_workers_share_the_sentences(data_dir):
    corpus = load(data_dir, min_count=1)
    parts = [
        texts(
            rows_of(corpus.dataset("train", 2, 4, num_shards=3, shard_index=i)),
            corpus.vocabulary,
        )
        for i in range(3)
    ]
    assert sum(parts, Counter()) == Counter(TRAIN)
    assert [sum(p.values()) for p in parts] == [40, 40, 40]
    with pytest.raises(ValueError, match="shard_index=3, num_shards=3"):
        corpus.dataset("train", 2, 4, num_shards=3, shard_index=3)


@pytest.mark.slow
def test_train_lm_trains_from_it(data_dir, tmp_path):
    folder = tmp_path / "run"
    options = {
        "tfds": "lm1b",
        "data_dir": str(data_dir),
        "output_dir": str(folder),
        "min_count": 3,
        "preset": "moe_256_h",
        "preset_factor": 32,
        "num_experts": 16,
        "num_sampled": 8,
        "batch_size": 8,
        "sequence_length": 8,
        "epochs": 2,
        "learning_rate": 0.03,
        "warmup_steps": 5,
        "verbose": 0,
    }
    with mock.patch.object(tfds_text, "_CHUNK", 16):
        train_lm.run(TrainLMOptions(**options))
    history = (folder / "history.csv").read_text().splitlines()
    perplexities = [
        float(line.split(",")[history[0].split(",").index("val_perplexity")])
        for line in history[1:]
    ]
    assert len(perplexities) == 2
    assert perplexities[-1] < 0.9 * perplexities[0]


def test_what_is_not_prepared_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"name='lm1b'.*prepare_lm1b"):
        data.load_tfds_text(data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="archive="):
        data.prepare_lm1b(tmp_path / "none.tar.gz", data_dir=tmp_path)
    (tmp_path / "other.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=f"must be called {NAME}"):
        data.prepare_lm1b(tmp_path / "other.tar.gz", data_dir=tmp_path)


@pytest.mark.slow
def test_another_archive_is_refused(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(b"not the archive")
    with pytest.raises(tfds.core.download.download_manager.NonMatchingChecksumError):
        data.prepare_lm1b(path, data_dir=tmp_path)
