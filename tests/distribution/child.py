"""Trains one model on one device and on several, in a process of its own.

`python -m tests.distribution.child SETTINGS`: SETTINGS is JSON with `devices` and a
list of `cases`; see `Case`. With `TF_CONFIG` the process is one of several. Prints one
line of JSON: for each case how far losses and weights are apart.
"""

import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy

import keras_moe
from keras_moe.data import pipelines
from tests import own_layers

OWN_GATES = {
    "hash": own_layers.HashGating,
    "stock": own_layers.StockGating,
    "above": own_layers.AboveGating,
}
VOCABULARY, TIME, WIDTH, BATCH = 20, 6, 16, 24


@dataclasses.dataclass(frozen=True)
class Case:
    """What to train."""

    num_experts: int = 8
    layer: str = "flat"
    optimizer: str = "SGD"
    options: dict = dataclasses.field(default_factory=dict)
    normalized: bool = False
    steps: int = 20
    repeats: int = 0
    examples: int = BATCH
    use_bias: bool = False
    model: str = "language"
    mask: bool = False
    dtype: str = "float32"
    rules: bool = False
    dropout: float = 0.0
    later: bool = False  # what gates take besides the paper
    int8: bool = False
    computation: str | None = None
    capacity: float | None = None
    backwards: bool = False
    segments: int | None = None
    unroll: bool = False
    nested: bool = False  # mixtures among the experts of a list


def start(num_devices: int) -> None:
    """Splits the CPU; before TensorFlow starts."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(max(4, num_devices))
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * num_devices,
    )


def take_all_cpus(num_devices: int) -> None:
    """Lets a process among several have more than one CPU, as it has all its GPUs."""

    def devices(self, cluster_resolver, worker_device):
        names = [f"{worker_device}/device:CPU:{i}" for i in range(num_devices)]
        return tuple(names), "CPU"

    kind = collective_all_reduce_strategy.CollectiveAllReduceExtended
    kind._initialize_local_devices = devices


def strategy_of(num_devices: int, group_size: int | None = None):
    """Of all devices of this process, in groups that hold all experts each."""
    if "TF_CONFIG" in os.environ:
        take_all_cpus(num_devices)
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        devices = [f"CPU:{i}" for i in range(num_devices)]
        strategy = tf.distribute.MirroredStrategy(devices)
    if group_size is not None:
        keras_moe.distribution.set_expert_parallel_size(strategy, group_size)
    return strategy


def scope_of(strategy):
    return strategy.scope() if strategy else contextlib.nullcontext()


def mixture(case: Case, name: str = "moe"):
    layers = keras_moe.layers
    rules = {
        "kernel_regularizer": keras.regularizers.L2(0.01),
        "bias_regularizer": lambda bias: 0.01 * tf.reduce_max(tf.abs(bias)),
        "kernel_constraint": keras.constraints.MaxNorm(0.8),
        "bias_constraint": keras.constraints.NonNeg(),
        "frozen_experts": (1, case.num_experts - 1),
    }
    experts = layers.FeedForwardExperts(
        case.num_experts,
        hidden_units=24,
        use_bias=case.use_bias,
        dropout=case.dropout,
        computation=case.computation,
        **(rules if case.rules else {}),
    )
    options = {"name": name, "losses_in_evaluation": True}
    if case.capacity is not None:
        options["capacity_factor"] = case.capacity
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 10, 0.3)
    both = {"noise_stddev": schedule, "z_loss_weight": 0.02} if case.later else {}
    flat = {**both, "switch_loss_weight": 0.1, "input_jitter": 0.1}
    flat = flat if case.later else {}
    if case.layer == "gated":
        experts = own_layers.GatedExperts(case.num_experts, hidden_units=24)
    if case.layer == "shared":
        experts = layers.GatedExperts(case.num_experts, hidden_units=24, use_bias=True)
        options["shared_experts"] = keras.Sequential(
            [keras.layers.Dense(8, "silu"), keras.layers.Dense(WIDTH)]
        )
    if case.layer == "low rank":
        experts = layers.GatedExperts(
            case.num_experts, hidden_units=24, lora_rank=3, dropout=0.3, seed=7
        )
    if case.layer in ("flat", "gated", "shared", "low rank"):
        gating = layers.NoisyTopKGating(
            k=2, gate_initializer="glorot_uniform", seed=5, **flat
        )
        return layers.MoE(experts, gating, **options)
    if case.layer in ("list", "plain list"):
        return layers.MoE(expert_list(case), noisy_gate(), **options)
    if case.layer == "groups of a list":
        experts = expert_list(case)
        return layers.HierarchicalMoE(experts, 4, k=(2, 1), **options)
    if case.layer == "own experts":
        experts = own_layers.StockExperts(case.num_experts)
        return layers.MoE(experts, noisy_gate(), **options)
    if case.layer in OWN_GATES:
        return layers.MoE(experts, OWN_GATES[case.layer](), **options)
    if case.layer == "groups by hash":
        primary = own_layers.HashGating()
        return layers.HierarchicalMoE(
            experts, 4, k=(1, 2), primary_gating=primary, **options
        )
    if case.layer == "hierarchical":
        primary = layers.NoisyTopKGating(
            k=2, gate_initializer="glorot_uniform", seed=6, **flat
        )
        return layers.HierarchicalMoE(
            experts,
            num_groups=4 if case.num_experts % 4 == 0 else case.num_experts,
            k=(2, 1),
            primary_gating=primary,
            **both,
            **options,
        )
    if case.layer == "loss-free":
        gating = layers.LossFreeGating(k=2, num_groups=2)
        return layers.MoE(experts, gating, **options)
    if case.layer == "expert choice":
        return layers.MoE(experts, layers.ExpertChoiceGating(), **options)
    if case.layer == "second by lot":
        return layers.MoE(experts, layers.GShardGating(seed=5), **options)
    if case.layer == "balanced":
        gating = layers.BalancedGating(k=2, z_loss_weight=0.02 * case.later)
        return layers.MoE(experts, gating, load_loss_weight=0.0, **options)
    raise ValueError(case.layer)


def noisy_gate():
    return keras_moe.layers.NoisyTopKGating(
        k=2, gate_initializer="glorot_uniform", seed=5
    )


def expert_list(case: Case):
    """Experts of different structure: with state, random numbers, losses of their own."""
    dense = keras.layers.Dense
    regularizer = keras.regularizers.L2(0.01)
    plain = [
        lambda: dense(WIDTH, "tanh"),
        lambda: keras.Sequential(
            [dense(8, "relu"), keras.layers.BatchNormalization(), dense(WIDTH)]
        ),
    ]
    kinds = [
        lambda: dense(WIDTH, "tanh", activity_regularizer=regularizer),
        plain[1],
        lambda: keras.Sequential(
            [dense(24, "silu"), keras.layers.Dropout(0.3, seed=3), dense(WIDTH)]
        ),
        lambda: keras.Sequential([keras.layers.LayerNormalization(), dense(WIDTH)]),
    ]
    if case.nested:
        kinds[0] = lambda: keras_moe.layers.MoE(
            keras_moe.layers.FeedForwardExperts(3, 8), noisy_gate(), name="inner"
        )
    if case.layer == "plain list":
        kinds = plain
    made = [kinds[i % len(kinds)]() for i in range(case.num_experts)]
    return keras_moe.layers.ExpertList(made)


def mix(case: Case, x):
    """The answer of the case's mixture, or the sum of those of two gates."""
    if case.layer == "recurrent":
        free = keras_moe.layers.LossFreeGating(k=2)
        return keras_moe.layers.MoELSTM(
            WIDTH,
            case.num_experts,
            free if case.later else noisy_gate(),
            return_sequences=True,
            go_backwards=case.backwards,
            segment_length=case.segments,
            losses_in_evaluation=True,
            name="moe",
        )(x)
    if case.layer in ("cell", "stacked cells", "attending cell", "cell both ways"):
        return recurrence_of_cells(case, x)
    if case.layer == "several gates":
        experts = keras_moe.layers.FeedForwardExperts(case.num_experts, 24)
        first, second = keras_moe.layers.MultiGateMoE(experts, gatings=2)(x)
        return first + 0.5 * second
    if not case.layer.endswith(" by half"):
        return mixture(case)(x)
    case = dataclasses.replace(case, layer=case.layer.removesuffix(" by half"))
    # Gates see half of the features.
    return mixture(case)(x, gate_inputs=x[..., ::2])


def recurrence_of_cells(case: Case, x):
    """A recurrence over a cell with a mixture: alone, both ways over two, attending."""
    cell = keras_moe.layers.MoELSTMCell(
        WIDTH,
        case.num_experts,
        keras_moe.layers.LossFreeGating(k=2) if case.later else noisy_gate(),
    )
    if case.layer == "attending cell":
        return keras_moe.layers.AttentionLSTM(cell, name="moe")(x, x)[0]
    options = {"return_sequences": True, "unroll": case.unroll, "name": "moe"}
    if case.layer == "cell":
        return keras.layers.RNN(cell, go_backwards=case.backwards, **options)(x)
    cells = [keras.layers.LSTMCell(WIDTH), cell]
    both_ways = keras.layers.RNN(cell if "both" in case.layer else cells, **options)
    return keras.layers.Bidirectional(both_ways, merge_mode="sum")(x)


def optimizer_of(case: Case):
    scaled = case.optimizer == "LossScaleOptimizer"
    of = keras_moe if case.optimizer == "FactoredAdam" else keras
    kind = getattr(of.optimizers, "Adam" if scaled else case.optimizer)
    options = dict(case.options)
    if "epsilon" in inspect.signature(kind).parameters:
        # Far above what sums in another order leave of a gradient that is zero. The
        # usual one is not: the step is then rounding divided by rounding, and large.
        options.setdefault("epsilon", 1e-3)
    if scaled:
        return keras.optimizers.LossScaleOptimizer(
            kind(**options), initial_scale=2.0**30
        )
    return kind(**options)


def build(case: Case, strategy=None) -> keras.Model:
    """The compiled model; always the same weights at the start."""
    keras.utils.clear_session()  # not within a scope, which it would break
    keras.utils.set_random_seed(0)
    keras.config.set_floatx(case.dtype)
    keras.config.set_dtype_policy(case.dtype)
    with scope_of(strategy):
        return _build(case)


def _build(case):
    models = {"translation": translator, "transformer": transformer}
    model = models.get(case.model, stack)(case)
    if case.int8:
        experts = model.get_layer("moe").experts
        experts.quantize("int8")
        experts.enable_lora(2)
    model.compile(
        optimizer_of(case),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def translator(case):
    """Both of its mixtures, dropout and attention."""
    model = keras_moe.models.MoETranslator(
        VOCABULARY,
        WIDTH,
        encoder_middle=mixture(case, "encoder_moe"),
        decoder_middle=mixture(dataclasses.replace(case, layer="flat"), "decoder_moe"),
        dropout=0.3,  # 1 / 0.7 has no end in binary
    )
    model.build(None)
    return model


def transformer(case):
    """Two blocks, the second with a mixture; dropout, shared keys, rotary positions."""
    inputs = keras.Input((TIME,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=case.mask)(inputs)
    for moe in (None, mixture(case)):
        x = keras_moe.layers.MoETransformerBlock(
            4,
            moe,
            causal=True,
            num_key_value_heads=2,
            max_wavelength=100.0,
            dropout=0.3,
        )(x)
    return keras.Model(inputs, keras.layers.Dense(VOCABULARY)(x))


def stack(case):
    inputs = keras.Input((TIME,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH, mask_zero=case.mask)(inputs)
    x = keras.layers.LSTM(WIDTH, return_sequences=True)(x)
    if case.normalized:
        x = keras.layers.BatchNormalization(synchronized=True)(x)
    x = x + mix(case, x)
    if case.normalized:
        x = keras.layers.BatchNormalization(synchronized=True)(x)
    x = keras.layers.LSTM(WIDTH, return_sequences=True)(x)
    return keras.Model(inputs, keras.layers.Dense(VOCABULARY)(x))


def dataset(case: Case) -> tf.data.Dataset:
    rng = np.random.default_rng(0)
    x = rng.integers(1, VOCABULARY, (case.examples, TIME)).astype("int32")
    if case.mask:
        x[:, TIME - 2 :] = 0
    y = ((x * 7 + 3) % VOCABULARY).astype("int32")
    if case.model == "translation":
        # Sentences of different lengths, padded at the end.
        lengths = rng.integers(2, TIME + 1, case.examples)[:, np.newaxis]
        real = np.arange(TIME) < lengths
        y = np.where(real, np.maximum(y, 3), 0).astype("int32")
        before = np.pad(y[:, :-1], [[0, 0], [1, 0]], constant_values=2)
        x = x * real, np.where(real, before, 0).astype("int32")
        x = tuple(part.astype("int32") for part in x)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    return pipelines.prefetched(data)  # or the end of `fit` may wait, a minute at most


class Losses(keras.callbacks.Callback):
    """The loss of every step, as Keras reports it at the end of an epoch.

    `logs` would be the mean over the replicas, also over those without examples.
    """

    def __init__(self):
        super().__init__()
        self.values: list[float] = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(self.model.get_metrics_result()["loss"]))


def train(model: keras.Model, case: Case, steps: int | None = None) -> list[float]:
    losses = Losses()
    steps = case.steps if steps is None else steps
    model.fit(
        dataset(case).repeat(),
        epochs=1,
        steps_per_epoch=steps,
        verbose=0,
        shuffle=False,
        callbacks=[losses],
    )
    return losses.values


def state_of(model: keras.Model) -> dict[str, np.ndarray]:
    """Weights and optimizer state, as Python sees them."""
    found = {f"w{i} {v.name}": v.numpy() for i, v in enumerate(model.weights)}
    variables = [v for v in model.optimizer.variables if "iteration" not in v.path]
    found |= {f"o{i} {v.name}": v.numpy() for i, v in enumerate(variables)}
    # A digest of other rounding errors is another number.
    return {k: v for k, v in found.items() if not re.search("seed_gen|digest", k)}


def difference(a: dict, b: dict) -> tuple[float, str]:
    """Largest difference and where; with respect to 1 or the largest value."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    worst, where = 0.0, ""
    for key, value in a.items():
        if value.size == 0:
            continue
        scale = max(1.0, float(np.max(np.abs(value))))
        apart = float(np.max(np.abs(value.astype("f8") - b[key]))) / scale
        if not apart <= worst:
            worst, where = apart, key
    return worst, where


def figures(model: keras.Model, name: str) -> list[float]:
    """That of every mixture, in the last step."""
    found = model.get_metrics_result()
    return [float(v) for k, v in sorted(found.items()) if k.endswith(name)]


def compare(case: Case, strategy) -> dict[str, Any]:
    model = build(case)
    before = state_of(model)
    expected = train(model, case), state_of(model)
    kept, overflow = figures(model, "choices_kept"), figures(model, "overflow")
    model = build(case, strategy)
    start_apart, _ = difference(before, state_of(model))
    losses = train(model, case)
    kept_here = figures(model, "choices_kept")
    overflow_here = figures(model, "overflow")
    apart, where = difference(expected[1], state_of(model))
    counters = re.compile("o|.*(counts|num_steps)")
    weights = {k: v for k, v in before.items() if not counters.match(k)}
    for _ in range(case.repeats):  # to the end, or the process that waits says so
        train(model, case)
    moved, _ = difference(weights, {k: expected[1][k] for k in weights})
    return {
        "start": start_apart,
        "losses": float(np.max(np.abs(np.subtract(expected[0], losses)))),
        "weights": apart,
        "where": where,
        "moved": moved,
        "choices_kept": kept,
        "choices_kept_here": kept_here,
        "overflow": overflow,
        "overflow_here": overflow_here,
        "first_and_last": [expected[0][0], expected[0][-1]],
    }


def main():
    settings = json.loads(sys.argv[1])
    start(settings["devices"])
    strategy = strategy_of(settings["devices"], settings.get("group_size"))
    results = [compare(Case(**case), strategy) for case in settings["cases"]]
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
