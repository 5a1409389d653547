"""Latency of an exported language model through TensorFlow's C API.

    python examples/benchmarks/serving_benchmark.py
    python examples/benchmarks/serving_benchmark.py --experts 4096 --hidden-units 240

A child process without site-packages loads the SavedModel with the C++ loader that
TensorFlow Serving uses, and answers `score` and `generate` of one token. Beside it a child
with the same model without its mixture: the rest of the time is the share of the mixture.
The two alternate request by request. Size of the export and time to write and load it are
printed too. `--quick` is a tiny run that only shows that everything works.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))

import keras
import numpy as np
import tensorflow as tf
from c_api_child import Child

from keras_moe import layers, models, serving


def language_model(a, with_mixture):
    middle = None
    if with_mixture:
        middle = layers.MoE(
            layers.FeedForwardExperts(a.experts, a.hidden_units),
            layers.NoisyTopKGating(k=a.k, gate_initializer="glorot_normal"),
            activation="sigmoid",
        )
    model = models.MoELanguageModel(a.vocabulary_size, a.units, middle=middle)
    model.build((None, None))
    return model


def exported(model, folder):
    """Path, bytes of the variables over bytes of the parameters, seconds."""
    start = time.perf_counter()
    path = serving.export(model, folder)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in (path / "variables").iterdir())
    return path, size / (4 * model.count_params()), seconds


def requests(a, rows, rng):
    ids = rng.integers(3, a.vocabulary_size, (rows, a.length)).astype("int32")
    settings = {
        "temperature": np.ones(rows, "float32"),
        "top_k": np.zeros(rows, "int32"),
        "max_new_tokens": np.ones(rows, "int32"),
        "seed": np.arange(rows, dtype="int64"),
    }
    return {
        f"score of {a.length} tokens": ("score", {"inputs": ids}),
        "one generated token": ("generate", {"inputs": ids[:, :1], **settings}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=256, help="number of experts")
    parser.add_argument("--units", type=int, default=512, help="width of the model")
    parser.add_argument(
        "--hidden-units", type=int, default=1024, help="hidden units of an expert"
    )
    parser.add_argument(
        "--vocabulary-size", type=int, default=10_000, help="number of words"
    )
    parser.add_argument("--k", type=int, default=4, help="experts for each token")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1, 8],
        help="numbers of rows of a request",
    )
    parser.add_argument("--length", type=int, default=32, help="tokens of a scored row")
    parser.add_argument("--repeat", type=int, default=101, help="requests of each kind")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.experts, a.units, a.hidden_units, a.vocabulary_size = 8, 8, 12, 50
        a.repeat = 3
    keras.utils.set_random_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for with_mixture in True, False:
            model = language_model(a, with_mixture)
            path, ratio, seconds = exported(model, Path(folder) / str(with_mixture))
            parameters = model.count_params()
            del model
            keras.backend.clear_session()
            children.append(Child(path))
            print(
                f"{'with' if with_mixture else 'without'} the mixture: {parameters:,} "
                f"parameters, variables of {ratio:.3f} x their bytes, written in "
                f"{seconds:.1f} s, loaded in {children[-1].loaded['seconds']:.1f} s",
                flush=True,
            )
        print(
            f"\n{a.experts} experts, k = {a.k}, {a.units} units, {a.hidden_units} hidden "
            f"units, vocabulary {a.vocabulary_size:,}, TensorFlow {tf.__version__}, "
            f"{os.cpu_count()} cores\n\n| request | rows | median (ms) | 95 % (ms) | "
            "without the mixture (ms) | share of the mixture |\n|---|---|---|---|---|---|"
        )
        for rows in a.rows:
            for title, (signature, inputs) in requests(a, rows, rng).items():
                for child in children:
                    child.ask(signature, repeat=3, **inputs)
                times = 1e3 * np.array(
                    [
                        [
                            child.ask(signature, **inputs)["seconds"][0]
                            for child in children
                        ]
                        for _ in range(a.repeat)
                    ]
                )
                whole, rest = np.median(times, axis=0)
                print(
                    f"| {title} | {rows} | {whole:.2f} | "
                    f"{np.percentile(times[:, 0], 95):.2f} | {rest:.2f} | "
                    f"{1 - rest / whole:.0%} |",
                    flush=True,
                )
        for child in children:
            child.close()


if __name__ == "__main__":
    main()
