"""Trains models whose words are shared out, and the same on one device.

`python -m tests.distribution.vocabulary_child SETTINGS`: SETTINGS is JSON with `engine`,
`devices` and a list of `cases`; with `TF_CONFIG` the process is one of several. Prints one
line of JSON: for each case how far losses and weights are apart, and what is said of the
model on several devices.
"""

import contextlib
import dataclasses
import json
import os
import sys
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

import keras_moe
from keras_moe.distribution import compatibility
from tests.distribution import child

# Not divided by two, three or four devices.
WORDS = 23


@dataclasses.dataclass(frozen=True)
class Case(child.Case):
    """What to train."""

    model: str = "language"
    num_sampled: int | None = None
    middle: bool = True
    evaluated: bool = False
    words: int = WORDS
    loss: str = "TokenCrossentropy"
    metrics: tuple = ("perplexity",)
    stateful: bool = False


def strategy_of(settings):
    """That of the settings, whose vocabularies are shared out."""
    if settings["engine"] == "dtensor":
        mesh = keras_moe.distribution.create_mesh(
            settings["devices"],
            device_type="CPU",
            expert_parallel_size=settings.get("group_size"),
        )
        strategy = keras_moe.distribution.DTensorStrategy(mesh)
    else:
        strategy = child.strategy_of(settings["devices"], settings.get("group_size"))
    if settings.get("sharded", True):
        keras_moe.distribution.shard_vocabulary(strategy)
    return strategy


def build(case, strategy=None):
    """The compiled model; always the same weights at the start."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_floatx(case.dtype)
    keras.config.set_dtype_policy(case.dtype)
    with child.scope_of(strategy):
        model = make(case)
        named = {"perplexity": keras_moe.telemetry.Perplexity}
        model.compile(
            child.optimizer_of(case),
            loss_of(case),
            weighted_metrics=[named.get(m, lambda m=m: m)() for m in case.metrics],
        )
        model.optimizer.build(model.trainable_variables)
    return model


def loss_of(case):
    if case.loss == "smoothed":
        return Smoothed()
    return keras_moe.losses.TokenCrossentropy()


class Smoothed(keras.losses.Loss):
    """Of logits, and of no kind that the softmax layer could compute itself."""

    def call(self, y_true, y_pred):
        plain = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.cast(y_true, tf.int32), y_pred
        )
        return plain - 0.01 * tf.reduce_mean(tf.nn.log_softmax(y_pred), axis=-1)


def make(case):
    models = keras_moe.models
    mixture = child.mixture(case) if case.middle else None
    if case.model == "language":
        model = models.MoELanguageModel(
            case.words,
            child.WIDTH,
            middle=mixture,
            dropout=case.dropout,
            num_sampled=case.num_sampled,
            stateful=case.stateful,
        )
    elif case.model == "translation":
        return child.translator(case)
    else:
        block = keras_moe.layers.MoETransformerBlock(2, mixture, causal=True)
        model = models.MoETransformerLanguageModel(
            case.words,
            [block],
            units=child.WIDTH,
            max_length=child.TIME,
            tied=case.model == "tied transformer",
        )
    model.build((None, child.TIME))
    return model


def dataset(case):
    return child.dataset(case)


@contextlib.contextmanager
def given_candidates(case):
    """Candidates that are the same on one device and on several, as random ones are not.

    Other ones on each replica, if they were not told to agree.
    """
    number = case.num_sampled

    def sample(self):
        if tf.distribute.in_cross_replica_context() or self.vocabulary is None:
            shift = 0
        else:
            shift = keras_moe.engine.current_replica() or 0
        ids = (np.arange(number) * 3 + 1) % case.words
        counts = 1 / (1 + np.arange(number)) + shift
        return tf.constant((ids + shift) % case.words, tf.int64), tf.constant(
            counts, tf.float32
        )

    kind = keras_moe.layers.SampledSoftmax
    with mock.patch.object(kind, "sample", sample) if number else _nothing():
        yield


_nothing = contextlib.nullcontext


def train(model, case):
    losses = child.Losses()
    model.fit(
        dataset(case).repeat(),
        epochs=1,
        steps_per_epoch=case.steps,
        verbose=0,
        shuffle=False,
        callbacks=[losses],
    )
    return losses.values


def measured(model, case):
    """Loss, metrics and predictions of a model."""
    found = model.evaluate(dataset(case), verbose=0, return_dict=True)
    figures = [*map(float, (found[k] for k in sorted(found)))]
    if "TF_CONFIG" in os.environ:  # each process would predict its part
        return figures, 0.0
    whole = dataset(dataclasses.replace(case, examples=child.BATCH))
    predicted = model.predict(whole, verbose=0)
    return figures, predicted


def relative(expected, found):
    """Largest difference, with respect to 1 or the number that is expected."""
    apart = np.abs(np.subtract(expected, found))
    return float(np.max(apart / np.maximum(np.abs(expected), 1.0)))


def compare(case, strategy):
    with given_candidates(case):
        model = build(case)
        before = child.state_of(model)
        expected = train(model, case), child.state_of(model)
        figures, predicted = measured(model, case)
        model = build(case, strategy)
        start, _ = child.difference(before, child.state_of(model))
        losses = train(model, case)
        apart, where = child.difference(expected[1], child.state_of(model))
        figures_here, predicted_here = measured(model, case)
    moved = {k: v for k, v in before.items() if k.startswith("w")}
    return {
        "start": start,
        "losses": float(np.max(np.abs(np.subtract(expected[0], losses)))),
        "weights": apart,
        "where": where,
        "moved": child.difference(moved, {k: expected[1][k] for k in moved})[0],
        "figures": relative(figures, figures_here),
        "predicted": float(np.max(np.abs(predicted - predicted_here))),
        "described": str(keras_moe.distribution.describe(model)),
    }


@contextlib.contextmanager
def recorded():
    """Kinds and shapes of the exchanges that a replica traces."""
    found: list[tuple[str, list]] = []
    with contextlib.ExitStack() as stack:
        for name in ("all_gather", "all_to_all", "all_reduce", "all_reduce_gradients"):
            stock = getattr(compatibility, name)

            def noted(strategy, value, *args, name=name, stock=stock):
                if keras_moe.engine.current_replica() == 0:
                    parts = value if isinstance(value, list) else [value]
                    found.extend((name, _shape(part)) for part in parts)
                return stock(strategy, value, *args)

            stack.enter_context(mock.patch.object(compatibility, name, noted))
        yield found


def _shape(value):
    return getattr(value, "values", value).shape.as_list()


def exchanged(case, strategy):
    """What steps of training and evaluation exchange, and what devices hold."""
    results = {}
    with recorded() as found:
        model = build(case, strategy)
        batches = strategy.experimental_distribute_dataset(dataset(case))
        batch = next(iter(batches))
        for name, step in (("fit", model.train_step), ("evaluate", model.test_step)):
            found.clear()
            run = tf.function(strategy.run, autograph=False)
            run.get_concrete_function(step, args=(batch,))
            results[name] = list(found)
    parts = [v for v in model.variables if getattr(v, "is_table", False)]
    shares = keras_moe.distribution.describe(model).shares
    tables = {id(v) for v in parts}
    slots = model.optimizer.variables
    parts += [v for v in slots if id(getattr(v, "slot_of", None)) in tables]
    return results | {
        "parts": [[p.shape.num_elements() for p in v.parts] for v in parts],
        "tables": [tuple(v.shape) for v in parts],
        "shares": [(s.layer, s.weight_bytes, s.slot_bytes) for s in shares],
    }


def expanded(case, strategy):
    """As `exchanged`, of the collectives that DTensor has made of a step."""
    results = {}
    model = build(case, strategy)
    batch = dataset(case).take(1)
    known = set(context.context().list_function_names())
    for name, run in (("fit", model.fit), ("evaluate", model.evaluate)):
        run(batch, verbose=0)
        every = set(context.context().list_function_names())
        results[name] = sorted(_collectives(every - known))
        known = every
    described = keras_moe.distribution.describe(model).variables
    return results | {
        "variables": [
            (each.path, each.kind, each.shape, each.layout, each.device_bytes)
            for each in described
        ]
    }


def _collectives(names):
    for name in names:
        definition = context.context().get_function_def(name)
        if any(node.op == "Relayout" for node in definition.node_def):
            continue  # not expanded
        for node in definition.node_def:
            if node.op.startswith("Collective"):
                (shape,) = node.attr["_output_shapes"].list.shape
                sizes = [dim.size for dim in shape.dim]
                yield node.op, int(np.prod(sizes)) if min([1, *sizes]) > 0 else -1


def main():
    settings = json.loads(sys.argv[1])
    on_mesh = settings["engine"] == "dtensor"
    if on_mesh and settings.get("exchanged"):
        os.environ["LOWER_DTENSOR_GATHER_TO_COLLECTIVE_GATHER_V2"] = "1"
    child.start(settings["devices"])
    strategy = strategy_of(settings)
    answer = compare
    if settings.get("exchanged"):
        answer = expanded if on_mesh else exchanged
    results = []
    for case in settings["cases"]:
        results.append(answer(Case(**case), strategy))
        print(results[-1], flush=True)
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
