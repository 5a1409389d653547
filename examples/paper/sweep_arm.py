"""What the arms of the sweep have in common, whatever they train."""

import dataclasses
import json
from typing import ClassVar

from keras_moe import writing
from keras_moe.commands import runs
from keras_moe.distribution import backups

# What a dense model has no use for is not to tell its records apart.
WITHOUT_MIXTURE = {
    "num_experts": 0,
    "shared_units": 0,
    "scaling_factor": 1.0,
    "gating": "noisy_top_k",
    "noise": "learned",
    "loss_weight": 0.0,
    "gate_learning_rate": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model, and how it is trained; the fields are those of the command."""

    corpus: str = "embedded"
    middle: str = "moe"
    shared_units: int = 0
    expert_dropout: float = 0.0
    scaling_factor: float = 1.0
    gating: str = "noisy_top_k"
    noise: str = "learned"
    activation: str = "linear"
    loss_weight: float = 0.01
    learning_rate: float = 0.004
    expert_learning_rate: float = 1.0
    gate_learning_rate: float = 1.0
    decay: str = "cosine"
    seed: int = 0

    # Settings that change nothing of the training, and are not in the names of folders.
    TEST_ONLY: ClassVar = ()

    def options_of(self, kind, **changes):
        """Options of a command, with the settings that it has, for one epoch."""
        names = {field.name for field in dataclasses.fields(kind)}
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k in names}
        return kind(**{**settings, "epochs": 1, **changes})

    def results(self, curve):
        """The figures that every arm has, of a `count()` and the points measured."""
        count = self.count()
        return {
            "curve": curve,
            "perplexity": curve[-1]["perplexity"],
            "operations": count.core_operations,
            "parameters": count.core_parameters,
            "training_cpu_seconds": round(sum(p["cpu_seconds"] for p in curve), 1),
        }


def resume(folder, model):
    """Loads the weights of the last point kept in a folder, if there is one.

    Returns:
        The curve up to it: a list of points.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = runs.checkpoints(folder)
    if not found:
        return []
    done = max(found)
    model.load_weights(found[done])
    return json.loads((folder / "curve.json").read_text())[:done]


def keep(folder, model, curve):
    """Writes the curve, and the weights of its last point in place of those before."""
    # The curve first: a point more than there are weights of is cut off.
    writing.write_text(folder / "curve.json", json.dumps(curve))
    point = len(curve)
    backups.write_weights(model, folder / f"epoch_{point}.weights.h5")
    for old in set(runs.checkpoints(folder)) - {point}:
        (folder / f"epoch_{old}.weights.h5").unlink()


def of_experts(logs, prefix=""):
    """What the logs say of the mixtures."""
    wanted = ("max_over_mean_load", "load_cv", "choices_kept")
    return {
        prefix + name: float(value)
        for name, value in logs.items()
        if name.endswith(wanted)
    }
