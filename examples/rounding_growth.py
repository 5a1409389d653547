"""How fast training magnifies a difference in rounding, on one device and on several.

    python examples/rounding_growth.py
    python examples/rounding_growth.py --dtype float32 --learning-rate 0.001

The job of `python -m keras_moe train-lm`, on one device; again from weights that differ by
one part in 1e16; on two devices; and on a mesh of two. Printed is how far the loss of a
step is from that of the first run. What one and several devices differ by is rounding as
long as these columns look alike. `--quick` is a tiny run that only shows that everything
works.
"""

import argparse
import json
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

RUNS = {
    "one device": {},
    "one device, other last digits": {"perturbed": True},
    "2 devices": {"devices": 2},
    "mesh of 2": {"dtensor": 2},
}


def losses_of(name, a):
    """The loss of every step, by a process that trains so."""
    import keras
    import numpy as np

    from keras_moe import data
    from keras_moe.commands import devices, runs, train_lm
    from keras_moe.commands.options import TrainLMOptions

    settings = dict(RUNS[name])
    perturbed = settings.pop("perturbed", False)
    small = {"units": 16, "hidden_units": 16, "num_experts": 8} if a.quick else {}
    options = TrainLMOptions(
        dtype=a.dtype, learning_rate=a.learning_rate, **settings, **small
    )
    losses = []

    class Losses(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.reset_metrics()

        def on_train_batch_end(self, batch, logs=None):
            losses.append(float(self.model.get_metrics_result()["loss"]))

    with runs.numbers_of(options.dtype):
        strategy = devices.make_strategy(options)
        corpus = data.load_text_corpus(min_count=options.min_count)
        keras.utils.set_random_seed(options.seed)
        with devices.scope_of(strategy):
            model = train_lm.build_model(
                options, len(corpus.vocabulary), "moe", a.steps
            )
        if perturbed:
            rng = np.random.default_rng(0)
            for variable in model.trainable_variables:
                change = 1 + 1e-16 * rng.standard_normal(variable.shape)
                variable.assign(variable.numpy().astype("float64") * change)
        train = corpus.dataset("train", options.batch_size, options.sequence_length)
        model.fit(
            train.repeat(),
            steps_per_epoch=a.steps,
            verbose=0,
            shuffle=False,
            callbacks=[Losses()],
        )
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dtype", default="float64", choices=("float32", "float64"), help="numbers"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=0.004, help="highest, as in train-lm"
    )
    parser.add_argument("--steps", type=int, default=346, help="steps of training")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    a = parser.parse_args()
    if a.quick:
        a.steps = 3
    if a.child:
        print(json.dumps(losses_of(a.child, a)))
        return
    found = {}
    for name in ("one device", "mesh of 2") if a.quick else RUNS:
        print(f"{a.steps} steps on {name} ...", file=sys.stderr, flush=True)
        output = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", name],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        found[name] = json.loads(output.splitlines()[-1])
    first, *others = found.values()
    print(f"{a.dtype}, learning rate {a.learning_rate}\n")
    print(f"| step | loss, one device | {' | '.join(list(found)[1:])} |")
    print("|---" * (2 + len(others)) + "|")
    shown = [1, *range(a.steps // 15 or 1, a.steps + 1, a.steps // 15 or 1)]
    for step in dict.fromkeys(shown):
        apart = [f"{abs(other[step - 1] - first[step - 1]):.0e}" for other in others]
        print(f"| {step} | {first[step - 1]:.4f} | {' | '.join(apart)} |")


if __name__ == "__main__":
    main()
