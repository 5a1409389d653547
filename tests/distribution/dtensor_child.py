"""Trains one model on one device and on a mesh, in a process of its own.

`python -m tests.distribution.dtensor_child SETTINGS`: as `child`, with a
`DTensorStrategy`; `job` in the settings picks another experiment of this file.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from keras_moe import distribution, serving
from tests.distribution import child


def strategy_of(settings):
    mesh = distribution.create_mesh(
        settings["devices"],
        expert_parallel_size=settings.get("expert_parallel_size"),
    )
    return distribution.DTensorStrategy(mesh)


def _in_scope(strategy, make):
    with strategy.scope() if strategy else contextlib.nullcontext():
        return make()


def trains_as_one_device(settings):
    strategy = strategy_of(settings)
    return [child.compare(child.Case(**case), strategy) for case in settings["cases"]]


def evaluates_and_predicts(settings):
    """Evaluation, prediction and eager calls, for a batch the mesh does not divide."""
    case = child.Case(num_experts=7, examples=child.BATCH + 7)
    plain = child.build(case)
    model = child.build(case, strategy_of(settings))
    data = child.dataset(case)
    tokens = np.concatenate([x for x, _ in data])
    expected = plain.predict(data, verbose=0)

    def apart(values):
        return float(np.max(np.abs(np.asarray(values) - expected)))

    return {
        "evaluate": [plain.evaluate(data, verbose=0), model.evaluate(data, verbose=0)],
        "predict": apart(model.predict(data, verbose=0)),
        "called": apart(model(tokens)),
        "in_a_function": apart(model.predict_on_batch(tokens)),
    }


def long_sequences(settings):
    """One step of a recurrent layer over many time steps; gradients compared."""
    kind = getattr(keras.layers, settings["layer"])
    strategy = strategy_of(settings)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, settings["time"], 4)).astype("float32")
    results = []
    for scope in (None, strategy):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = _in_scope(scope, lambda: _recurrent(kind, settings["time"]))
        losses = model.fit(x, x, batch_size=6, epochs=2, verbose=0, shuffle=False)
        results.append((losses.history["loss"], model.get_weights()))
    (losses, weights), (other_losses, others) = results
    return {
        "losses": float(np.max(np.abs(np.subtract(losses, other_losses)))),
        "weights": max(
            float(np.max(np.abs(a - b))) for a, b in zip(weights, others, strict=True)
        ),
        "learned": losses[0] - losses[-1],
    }


def _recurrent(kind, time):
    model = keras.Sequential(
        [keras.Input((time, 4)), kind(5, return_sequences=True), keras.layers.Dense(4)]
    )
    model.compile(keras.optimizers.SGD(1.0), "mse")
    return model


def writes_files(settings):
    """Trains, writes every format, and says what the model predicts."""
    case = child.Case(num_experts=7, optimizer=settings["optimizer"])
    strategy = _strategy(settings)
    model = child.build(case, strategy)
    child.train(model, case, 2)
    folder = Path(settings["folder"])
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(
        str(folder / "checkpoint")
    )
    np.save(folder / "predictions.npy", model.predict(child.dataset(case), verbose=0))
    _restart_noise(model)
    np.save(folder / "losses.npy", child.train(model, case, 3))
    return {}


def _restart_noise(model):
    """Keras keeps no states of random generators in its files."""
    for variable in model.variables:
        if variable.path.endswith("seed_generator_state"):
            variable.assign([7, 0])


def reads_files(settings):
    """Loads what `writes_files` wrote; predictions and further losses apart."""
    case = child.Case(num_experts=7, optimizer=settings["optimizer"])
    strategy = _strategy(settings)
    folder = Path(settings["folder"])
    expected = np.load(folder / "predictions.npy")
    losses = np.load(folder / "losses.npy")
    found = {}
    for form in ("model.keras", "model.weights.h5", "checkpoint"):
        model = child.build(case, strategy)
        if form == "model.keras":
            keras.utils.clear_session()
            model = _in_scope(
                strategy, lambda: keras.saving.load_model(folder / "model.keras")
            )
        elif form == "checkpoint":
            _in_scope(
                strategy, lambda m=model: m.optimizer.build(m.trainable_variables)
            )
            checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
            checkpoint.read(str(folder / "checkpoint")).assert_consumed()
        else:
            model.load_weights(folder / form)
        predictions = model.predict(child.dataset(case), verbose=0)
        found[form] = {"predictions": float(np.max(np.abs(predictions - expected)))}
        if form != "model.weights.h5":
            _restart_noise(model)
            after = child.train(model, case, 3)
            found[form]["losses"] = float(np.max(np.abs(after - losses)))
    return found


def exports(settings):
    """The exported signature against the model on the mesh."""
    case = child.Case(num_experts=7, optimizer="Adam")
    strategy = strategy_of(settings)
    model = child.build(case, strategy)
    child.train(model, case, 3)
    tokens = np.random.default_rng(1).integers(1, child.VOCABULARY, (4, child.TIME))
    tokens = tokens.astype("int32")
    expected = model.predict(tokens, verbose=0)
    with strategy.scope():
        path = serving.export(model, settings["folder"])
    loaded = tf.saved_model.load(str(path)).signatures["serving_default"]
    (name,) = loaded.structured_input_signature[1]
    found = loaded(**{name: tf.constant(tokens)})["outputs"].numpy()
    return {
        "apart": float(np.max(np.abs(found - expected))),
        "largest": float(np.max(np.abs(found))),
    }


def _strategy(settings):
    if settings["engine"] == "one device":
        return None
    if settings["engine"] == "dtensor":
        return strategy_of(settings)
    return child.strategy_of(settings["devices"])


JOBS = (
    trains_as_one_device,
    evaluates_and_predicts,
    long_sequences,
    writes_files,
    reads_files,
    exports,
)


def main():
    settings = json.loads(sys.argv[1])
    child.start(settings["devices"])
    job = settings.get("job", "trains_as_one_device")
    run = {each.__name__: each for each in JOBS}[job]
    print("RESULT " + json.dumps(run(settings)), flush=True)


if __name__ == "__main__":
    main()
