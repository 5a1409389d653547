"""The pairs that `examples/source_information.py` measures."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow as tf

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


class Model:
    """Its log loss of a pair is how far source and target are apart."""

    def __init__(self):
        self.vocabulary = SimpleNamespace(
            encode_source=lambda texts, languages: self.encode_target(texts),
            encode_target=self.encode_target,
        )

    @staticmethod
    def encode_target(texts):
        return tf.RaggedTensor.from_tensor([[int(text)] for text in texts])

    @staticmethod
    def score(source, target):
        return -tf.cast(tf.abs(source - target), tf.float32)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("source_information")


@pytest.mark.parametrize("count", [2, 3, 100, 101, 201])
def test_no_sentence_is_given_its_own_source_as_that_of_another(script, count):
    texts = [str(i) for i in range(1, count + 1)]
    corpus = SimpleNamespace(pairs={"test": {"en-fr": (texts, texts)}})
    (batches,) = script.encoded(Model(), corpus, sentences=1000).values()
    assert sum(len(target) for _, target in batches) == count
    for batch in batches:
        (own, _), (other, subwords) = script.losses(Model(), [batch])
        assert own == 0
        # Each row but the first has the source before it, at a distance of 1.
        assert other == 2 * (len(batch[1]) - 1)
        assert subwords == len(batch[1]) >= 2


def test_a_single_sentence_is_refused(script, tmp_path, capsys):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en-fr.tsv").write_text("one\tun\n")
    for arguments in ([], ["--sentences", "1"]):
        with pytest.raises(SystemExit, match="2"):
            script.main(["model.keras", "--data-dir", str(tmp_path), *arguments])
        assert "at least 2 test pairs" in capsys.readouterr().err
