"""The options that say on which devices a command trains."""

import json
import subprocess
import sys

import pytest

from keras_moe import distribution
from keras_moe.commands import devices
from keras_moe.commands.options import TrainLMOptions
from tests.distribution import children


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"devices": 4, "expert_parallel_size": 3},
            "must divide `devices`. Received: expert_parallel_size=3, devices=4",
        ),
        ({"expert_parallel_size": 2}, "expert_parallel_size=2, devices=1"),
        ({"devices": 2, "expert_parallel_size": 0}, "at least 1 .*Received"),
        ({"dtensor": 2, "expert_parallel_size": 4}, "must divide `dtensor`"),
    ],
)
def test_groups_of_devices_are_equal(options, message):
    with pytest.raises(ValueError, match=message):
        devices.launch_workers(TrainLMOptions(**options))


@pytest.mark.parametrize(("option", "number"), [("devices", 2), ("workers", 3)])
def test_the_strategy_gets_its_size(option, number, monkeypatch):
    asked = []
    strategy = object.__new__(devices.tf.distribute.MirroredStrategy)
    monkeypatch.setattr(devices, "_strategy_of", lambda options: strategy)
    monkeypatch.setattr(
        distribution, "set_expert_parallel_size", lambda *given: asked.append(given)
    )
    options = TrainLMOptions(**{option: number, "expert_parallel_size": 1})
    assert devices.make_strategy(options) is strategy
    assert asked == [(strategy, 1)]
    devices.make_strategy(TrainLMOptions(**{option: number}))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "several devices .*Received: shard_vocabulary=True, devices=None"),
        ({"devices": 1}, "devices=1, workers=None, dtensor=None. Set one"),
        (
            {"devices": 2, "num_sampled": 5, "untouched_rows": "keep"},
            "`untouched_rows` must be 'decay' .*Received: 'keep'",
        ),
    ],
)
def test_words_need_devices_to_be_shared_out(options, message):
    with pytest.raises(ValueError, match=message):
        devices.launch_workers(TrainLMOptions(shard_vocabulary=True, **options))


def test_the_strategy_is_told_to_share_words_out(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "_strategy_of", lambda options: "strategy")
    monkeypatch.setattr(distribution, "shard_vocabulary", asked.append)
    options = TrainLMOptions(devices=2, shard_vocabulary=True, num_sampled=5)
    assert not devices.launch_workers(options)
    assert devices.make_strategy(options) == "strategy"
    assert asked == ["strategy"]
    devices.make_strategy(TrainLMOptions(devices=2))
    assert len(asked) == 1


def test_one_device_is_a_group():
    assert not devices.launch_workers(TrainLMOptions(expert_parallel_size=1))
    assert devices.make_strategy(TrainLMOptions(expert_parallel_size=1)) is None


@pytest.mark.exhaustive
@pytest.mark.slow
def test_groups_of_devices_train_as_one(tmp_path):
    text = "\n".join(" ".join(f"w{(i + j) % 9}" for j in range(6)) for i in range(60))
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(text + "\n")
    found = []
    for name, more in (("one", []), ("groups", ["--devices", "4"])):
        more += ["--expert-parallel-size", "2"] if more else []
        sizes = "--num-experts 4 --k 2 --units 8 --hidden-units 8 --batch-size 8"
        sizes += " --sequence-length 5 --epochs 1 --min-count 1 --learning-rate 0.001"
        command = ["-m", "keras_moe", "train-lm", "--data-dir", str(tmp_path)]
        command += ["--output-dir", str(tmp_path / name), *sizes.split(), *more]
        subprocess.run(
            [sys.executable, *command], check=True, env=children.environment()
        )
        report = json.loads((tmp_path / name / "report.json").read_text())
        found.append(report["test_perplexity"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
