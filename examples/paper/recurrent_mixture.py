"""A mixture of experts inside the recurrence (section 3.1), trained on topics.

    python examples/paper/recurrent_mixture.py

Between the two LSTMs of the model of `topic_bigram.py` stands a third recurrent layer:
`MoELSTM` with 16 weight matrices of which a token takes 4, or a plain LSTM that spends
as many multiply-adds. The paper suggests the former and did not try it.

Check: the mixture has the lower perplexity and uses all its experts (busiest expert at
most 3 times the mean). `--quick` is a short run that only shows that all works.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from topic_bigram import UNITS, build_model, make_task, train

from keras_moe.layers import MoELSTM, NoisyTopKGating

K = 4


def make_dense():
    """A wider LSTM and a projection of as many multiply-adds as k experts."""
    budget = K * (2 * UNITS) * 4 * UNITS
    units = 1
    while 4 * units * (UNITS + units) + units * UNITS < budget:
        units += 1
    return keras.Sequential(
        [
            keras.layers.LSTM(units, return_sequences=True),
            keras.layers.Dense(UNITS, use_bias=False),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="short, for a test")
    a = parser.parse_args()
    steps = 10 if a.quick else a.steps
    task = make_task(a.seed)
    print(f"Floor of the perplexity: {task.floor_perplexity:.2f}", flush=True)
    reports = {}
    for name, make in (
        ("lstm", make_dense),
        (
            "moe_lstm",
            lambda: MoELSTM(
                UNITS,
                a.experts,
                NoisyTopKGating(k=K),
                return_sequences=True,
                name="moe",
            ),
        ),
    ):
        keras.utils.set_random_seed(a.seed)
        start = time.perf_counter()
        reports[name] = train(
            build_model(make()),
            task,
            steps=steps,
            seed=a.seed,
            evaluation_steps=5 if a.quick else 50,
        )
        figures = ", ".join(f"{k} {v:.3f}" for k, v in reports[name].items())
        print(f"{name}: {figures} ({time.perf_counter() - start:.0f} s)", flush=True)
    if a.quick:
        return
    mixture = reports["moe_lstm"]
    checks = {
        "lower perplexity": mixture["perplexity"] < reports["lstm"]["perplexity"],
        "all experts in use": mixture["max_over_mean_load"] <= 3.0,
    }
    for text, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED'}: {text}")
    if not all(checks.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
