"""The models that the experiments train on the language of `topic_bigram.py`."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from experiment import start_afresh
from measures import balance_in_training
from topic_bigram import (
    TOPICS,
    UNITS,
    build_model,
    evaluate,
    make_task,
    train,
)

from keras_moe import layers, telemetry
from keras_moe.layers.routing_record import recorded_routing, routing_tensors
from keras_moe.optimizers import FactoredAdam

K = 4
HIDDEN = 32  # of one expert


class BlockedGating(layers.TopKGating):
    """A gate through which nothing upstream learns, either."""

    def call(self, inputs, mask=None, training=None):
        return super().call(tf.stop_gradient(inputs), mask=mask, training=training)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model, and how it is trained.

    Attributes:
        middle: "moe", "hierarchical" (as many groups as experts in a group),
            "balanced" (the strictly balanced gate), "wide" or "deep" (one expert of
            equal operations).
        num_experts: Of a mixture.
        importance_weight: Weight of the importance loss.
        load_weight: Weight of the load loss.
        gate: "noisy"; "plain", without noise; "frozen", plain with random weights
            that are not trained; "blocked", frozen, and its input is not trained
            through it either.
        distractors: Features of pure noise that the mixture is given besides.
        optimizer: "adam"; "factored" (FactoredAdam), "experts_fixed" (Adam, and
            the experts stay as they were at the start).
        batches: Number of different batches, or None for new ones at every step.
        steps: Of training.
        seed: Of the language, the data, the weights and the noise.
        evaluation_steps: Batches of evaluation.
    """

    middle: str = "moe"
    num_experts: int = 64
    importance_weight: float = 0.1
    load_weight: float = 0.1
    gate: str = "noisy"
    distractors: int = 0
    optimizer: str = "adam"
    batches: int | None = None
    steps: int = 1500
    seed: int = 0
    evaluation_steps: int = 50

    def shortened(self):
        """The same for a test of seconds."""
        size = min(self.num_experts, 9 if self.middle == "hierarchical" else 8)
        batches = self.batches and 5
        return dataclasses.replace(
            self,
            num_experts=size,
            importance_weight=0.1 * bool(self.importance_weight),
            load_weight=0.1 * bool(self.load_weight),
            batches=batches,
            steps=10,
            evaluation_steps=2,
        )

    def model(self):
        """The model, not compiled."""
        return build_model(make_middle(self), self.distractors)

    def run(self):
        """Trains and measures.

        Returns:
            Dict of figures; see `measure`, and for the strictly balanced gate
            `with_halved_thresholds`.
        """
        start_afresh(self.seed)
        task = make_task(self.seed)
        model = self.model()
        optimizer = make_optimizer(self, model)
        report = train(
            model,
            task,
            steps=self.steps,
            seed=self.seed,
            evaluation_steps=self.evaluation_steps,
            optimizer=optimizer,
            batches=self.batches,
        )
        middle = model.get_layer("moe")
        results = {
            "perplexity": report["perplexity"],
            "floor": task.floor_perplexity,
            "expert_operations": expert_operations(middle),
            "gate_operations": gate_operations(middle),
            "parameters": model.count_params(),
        }
        if middle.num_experts > 1:
            results["expert_state"] = expert_state(model)
            results |= {
                "hard_load_cv": report["load_cv"],
                "hard_max_over_mean": report["max_over_mean_load"],
            }
            results |= measure(model, task, self.evaluation_steps)
        if self.middle == "balanced":
            results |= with_halved_thresholds(model, task, self.evaluation_steps)
        return results


@dataclasses.dataclass(frozen=True)
class LoudArm(Arm):
    """An arm whose embeddings start with standard deviation 1.

    Those of Keras start at 0.03, a hundredth of the distractors' 3.
    """

    def model(self):
        normal = keras.initializers.RandomNormal(stddev=1.0)
        return build_model(make_middle(self), self.distractors, normal)


def make_middle(arm):
    """What stands between the LSTMs, named "moe"."""
    options = {
        "importance_loss_weight": arm.importance_weight,
        # With every expert taking every token the load is constant.
        "load_loss_weight": arm.load_weight if arm.num_experts > K else 0.0,
        "activation": "sigmoid",
        "name": "moe",
    }
    if arm.middle in ("wide", "deep"):
        # units * h + (n - 1) * h * h + h * units = k * 2 * units * h
        deep = [HIDDEN] * (1 + (K - 1) * 2 * UNITS // HIDDEN)
        hidden = K * HIDDEN if arm.middle == "wide" else deep
        experts = layers.FeedForwardExperts(1, hidden, output_units=UNITS)
        return layers.MoE(experts, layers.SoftmaxGating(), **options)
    experts = layers.FeedForwardExperts(arm.num_experts, HIDDEN, output_units=UNITS)
    if arm.middle == "hierarchical":
        groups = round(arm.num_experts**0.5)
        return layers.HierarchicalMoE(experts, groups, k=(2, K // 2), **options)
    if arm.middle == "balanced":
        return layers.MoE(experts, layers.BalancedGating(k=K), **options)
    return layers.MoE(experts, make_gate(arm.gate), **options)


def make_gate(kind):
    if kind == "noisy":
        return layers.NoisyTopKGating(k=K)
    if kind == "plain":
        return layers.TopKGating(k=K)
    gate = (BlockedGating if kind == "blocked" else layers.TopKGating)(k=K)
    gate.trainable = False
    return gate


def make_optimizer(arm, model):
    """The class of the optimizer, ready for `train`."""
    if arm.optimizer == "factored":
        return FactoredAdam
    if arm.optimizer == "experts_fixed":
        model.get_layer("moe").experts.trainable = False
    return keras.optimizers.Adam


def expert_operations(middle):
    """Multiply-adds of a token in its experts."""
    size = sum(w.shape.num_elements() for w in kernels_of(middle))
    return size // middle.num_experts * (K if middle.num_experts > 1 else 1)


def gate_operations(middle):
    """Multiply-adds of a token in its gates, those of the noise included."""
    gating = middle.gating
    if middle.num_experts == 1:
        return 0
    names = ("gate_kernel", "noise_kernel")
    own = [w for w in gating.weights if w.name in names and w.shape.rank == 2]
    total = sum(w.shape.num_elements() for w in own)
    for kernel in gating.weights:
        if kernel.name in names and kernel.shape.rank == 3:  # (groups, D, size)
            total += gating.k[0] * kernel.shape.num_elements() // kernel.shape[0]
    return total


def kernels_of(middle):
    return middle.experts.kernels


def expert_state(model):
    """How many numbers the optimizer keeps for the experts' weights."""
    kernels = kernels_of(model.get_layer("moe"))
    if isinstance(model.optimizer, FactoredAdam):
        slots = [s for kernel in kernels for s in model.optimizer.slots_of(kernel)]
    else:  # a slot is named after its variable
        names = tuple(kernel.path.replace("/", "_") for kernel in kernels)
        slots = [v for v in model.optimizer.variables if v.name.startswith(names)]
    return sum(slot.shape.num_elements() for slot in slots)


def measure(model, task, evaluation_steps):
    """How the experts are used.

    Returns:
        Those of `balance_in_training`. At inference: `experts_per_token`,
        `without_expert`; and `information`, that of the expert with the largest gate
        and the topic, as a fraction of the topic's entropy, with
        `information_shuffled`, the largest of shuffled topics.
    """
    data = task.dataset(min(20, evaluation_steps), seed=555_555)
    results = balance_in_training(model, (inputs for inputs, _ in data))
    return results | at_inference(model, task, evaluation_steps)


def at_inference(model, task, evaluation_steps):
    moe = model.get_layer("moe")
    numbers, counts, labels = [], [], []
    for inputs, _ in task.dataset(evaluation_steps, seed=777_777):
        with recorded_routing([moe]) as records:
            model(inputs, training=False)
        experts, gates = (t.numpy() for t in routing_tensors(records["moe"][0]))
        numbers.append((experts >= 0).sum(-1))
        top = np.take_along_axis(experts, gates.argmax(-1)[..., None], -1)[..., 0]
        counts += [np.bincount(row[row >= 0], minlength=moe.num_experts) for row in top]
        labels.append(inputs[0].numpy())
    information = telemetry.label_information(
        np.stack(counts), np.concatenate(labels), TOPICS
    )
    return {
        "experts_per_token": float(np.mean(numbers)),
        "without_expert": float(np.mean(np.equal(numbers, 0))),
        "information": information.information / np.log(TOPICS),
        "information_shuffled": max(information.shuffled) / np.log(TOPICS),
    }


def with_halved_thresholds(model, task, evaluation_steps):
    """What is left of the strictly balanced gate with wrong thresholds."""
    thresholds = model.get_layer("moe").gating.thresholds
    learned = thresholds.numpy()
    thresholds.assign(0.5 * learned)
    halved = evaluate(model, task, steps=evaluation_steps)
    per_token = at_inference(model, task, evaluation_steps)["experts_per_token"]
    thresholds.assign(learned)
    return {
        "halved_perplexity": halved["perplexity"],
        "halved_experts_per_token": per_token,
    }
