"""What the balancing losses do: the same language model with and without them.

    python examples/balance_losses.py --output-dir runs/balance_losses

Trains the model of `train_language_model.py` twice on the embedded corpus, with the
weights of the importance and the load loss at 0.1 and at 0, and compares how many tokens
of the test text each of the 64 experts gets (true counts, without noise).

With the losses the busiest expert gets less than twice the mean. Without them a few
experts take nearly everything, which the paper reports in table 6 as a maximum of 17.8
times the mean. `--quick` is a short run that only shows that everything works.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from matplotlib.figure import Figure

from keras_moe.commands import train_lm
from keras_moe.commands.options import TrainLMOptions


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output-dir",
        default="runs/balance_losses",
        help="folder for everything written",
    )
    parser.add_argument(
        "--epochs", type=int, default=2, help="passes over the training text"
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    parser.add_argument("--quick", action="store_true", help="tiny, for a test")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    tiny = {
        "units": 16,
        "hidden_units": 16,
        "num_experts": 8,
        "min_count": 200,
        "sequence_length": 256,
    }
    reports, loads = {}, {}
    for weight in (0.1, 0.0):
        print(f"\n=== weight of both losses: {weight} ===", flush=True)
        options = TrainLMOptions(
            output_dir=str(folder / f"weight_{weight}"),
            loss_weight=weight,
            epochs=1 if arguments.quick else arguments.epochs,
            seed=arguments.seed,
            verbose=2,
            **(tiny if arguments.quick else {}),
        )
        reports[weight] = train_lm.run(options)
        loads[weight] = np.array(reports[weight]["expert_counts"])
    print("\n| weight of both losses | test perplexity | max/mean load | CV of load |")
    print("|---|---|---|---|")
    for weight, report in reports.items():
        print(
            f"| {weight} | {report['test_perplexity']:.1f} "
            f"| {report['max_over_mean_load']:.2f} | {report['load_cv']:.2f} |"
        )
    print(f"\nPicture: {draw(loads, folder / 'balance_losses.png')}")


def draw(loads, path):
    """Load of the experts, the busiest first, one panel for each weight."""
    figure = Figure(figsize=(8.4, 3.4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(loads), sharey=True)
    for axes, (weight, counts) in zip(panels, loads.items(), strict=True):
        relative = np.sort(counts)[::-1] / counts.mean()
        axes.bar(np.arange(relative.size), relative, width=0.9, color="#2a6f97")
        axes.axhline(1.0, color="#c8553d", linestyle="--", label="perfect balance")
        axes.set(
            title=f"loss weights {weight}: max/mean {relative[0]:.1f}",
            xlabel="expert, the busiest first",
        )
        axes.legend()
    panels[0].set_ylabel("load / mean load")
    figure.savefig(path)
    return path


if __name__ == "__main__":
    main()
