import json

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.__main__ import main


def test_one_preset_with_picture_and_figures(tmp_path, capsys):
    assert main(["plan", "--preset", "moe_65536_h", "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    # 68,791.0 million (table 8), embedding and softmax of 100,000 words.
    assert "68,893,442,048 parameters" in printed
    for text in ("moe_65536_h", "all-to-all", "TFLOPS a device", "0 to 1,023", "peak"):
        assert text in printed
    (figures,) = json.loads((tmp_path / "plan.json").read_text())
    assert figures["min_devices"] == 64
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_all_presets_on_a_cluster_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text(
        '{"name": "mine", "device": "card", "num_devices": 1000, "memory_gb": 24, '
        '"teraflops": 30, "efficiency": 0.5, "memory_gb_per_second": 900, '
        '"network_gb_per_second": 10, "sources": ["made up"]}'
    )
    assert main(["plan", "--preset", "all", "--cluster", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "moe_4096_h_100b" in printed
    assert "mt_moe_2048_h" in printed
    assert "mine: made up" in printed


def test_an_unknown_preset_or_cluster_is_an_error_of_one_line(capsys):
    assert main(["plan", "--preset", "moe_5"]) == 2
    assert "name='moe_5'" in capsys.readouterr().err
    assert main(["plan", "--cluster", "nowhere"]) == 2
    assert "cluster='nowhere'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_ones_own_and_its_scaling(tmp_path, capsys):
    moe = layers.MoE(layers.FeedForwardExperts(8, 64), layers.TopKGating(k=2))
    model = keras.Sequential([keras.Input((32,)), moe, keras.layers.Dense(1)])
    model.compile("adam", "mse")
    path = tmp_path / "model.keras"
    model.save(path)
    given = ["plan", "--model", str(path), "--cluster", "h100", "--num-devices", "8"]
    out = ["--output-dir", str(tmp_path / "plan"), "--scaling", "2048"]
    assert main([*given, "--batch-size", "256", *out]) == 0
    printed = capsys.readouterr().out
    for text in ("256 examples each", "Devices that share the experts", "optimizer"):
        assert text in printed
    for text in ("2,048", "stops paying" if "stops" in printed else "pays", "moe_4"):
        assert text in printed
    (figures,) = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert sorted(figures["groups"]) == ["1", "2", "4", "8"]
    assert figures["weights"] == sum(np.asarray(v).nbytes for v in model.variables)
    (scaling,) = json.loads((tmp_path / "plan" / "scaling.json").read_text())
    assert scaling["points"][-1]["num_devices"] == 2048
    for name in ("plan.png", "scaling.png"):
        assert (tmp_path / "plan" / name).read_bytes().startswith(b"\x89PNG")
    assert main(given) == 2
    assert "batch_size=None" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path / "none.keras")]) == 2
    assert "no file" in capsys.readouterr().err
    assert main(["plan", "--batch-size", "8"]) == 2
    assert "batch_size=8 for a preset" in capsys.readouterr().err
