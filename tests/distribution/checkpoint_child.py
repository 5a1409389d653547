"""One stage of a training run that moves between numbers of devices.

Each stage loads what the stage before has written, in every format, trains two steps
and writes again. The stage on one device also trains all steps without a break.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_moe
from keras_moe import distribution
from tests.distribution import child

STEPS = 2


def build(strategy, words=False):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    with child.scope_of(strategy):
        if words:
            model = keras_moe.models.MoELanguageModel(
                child.VOCABULARY, child.WIDTH, dropout=0.0
            )
            model.build((None, child.TIME))
            compile_model(model)
            return model
        model = keras.Sequential(
            [
                keras.Input((child.TIME,), dtype="int32"),
                keras.layers.Embedding(child.VOCABULARY, child.WIDTH),
                # Five groups of two experts: never the same number on a device.
                keras_moe.layers.HierarchicalMoE(
                    keras_moe.layers.FeedForwardExperts(10, hidden_units=24),
                    num_groups=5,
                    primary_gating=keras_moe.layers.NoisyTopKGating(k=2, seed=3),
                ),
                keras.layers.Dense(child.VOCABULARY),
            ]
        )
        compile_model(model)
    return model


def compile_model(model):
    model.compile(
        keras.optimizers.AdamW(0.02, weight_decay=0.01, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)


def train(model, stage, callbacks=(), epochs=None):
    # Keras saves no states of random generators.
    for variable in model.variables:
        if variable.path.endswith("seed_generator_state"):
            variable.assign([1, 1000 * stage])
    losses = child.Losses()
    model.fit(
        child.dataset(child.Case()).repeat(),
        epochs=1 if epochs is None else epochs,
        steps_per_epoch=STEPS,
        verbose=0,
        shuffle=False,
        callbacks=[losses, *callbacks],
    )
    return losses.values


class Capture(keras.callbacks.Callback):
    """The state that training begins with."""

    def on_train_begin(self, logs=None):
        self.state = values(self.model)


def values(model):
    return list(child.state_of(model).values())


def forget(model):
    for variable in (*model.weights, *model.optimizer.variables):
        variable.assign(np.zeros(variable.shape, variable.dtype))


def main():
    settings = json.loads(sys.argv[1])
    stage, devices = settings["stage"], settings["devices"]
    child.start(devices)
    strategy = None
    if settings["engine"] == "dtensor":
        strategy = distribution.DTensorStrategy(distribution.create_mesh(devices))
    elif settings["engine"] == "mirrored":
        strategy = child.strategy_of(devices, settings.get("group_size"))
    words = settings.get("words", False)
    if words and strategy is not None and words != "everywhere":
        distribution.shard_vocabulary(strategy)
    folder = Path(settings["directory"])
    model = build(strategy, words)
    with child.scope_of(strategy):
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    states = []
    if stage:
        forget(model)
        model.load_weights(folder / f"{stage - 1}.weights.h5")
        states.append(values(model))
        forget(model)
        checkpoint.read(str(folder / f"checkpoint_{stage - 1}")).assert_consumed()
        states.append(values(model))
        with child.scope_of(strategy):
            states.append(
                values(keras.saving.load_model(folder / f"{stage - 1}.keras"))
            )
        forget(model)
    backup = keras.callbacks.BackupAndRestore(
        folder / "backup", delete_checkpoint=False
    )
    capture = Capture()
    losses = train(model, stage, [backup, capture], epochs=stage + 1)
    model.save_weights(folder / f"{stage}.weights.h5")
    model.save(folder / f"{stage}.keras")
    checkpoint.write(str(folder / f"checkpoint_{stage}"))
    results = {
        "losses": losses,
        # Every file gave what the backup gave, to the last bit.
        "apart": [
            max(
                float(np.max(np.abs(a - b)))
                for a, b in zip(state, capture.state, strict=True)
            )
            for state in states
        ],
    }
    if strategy is None:
        model = build(None, words)
        results["unbroken"] = [train(model, i) for i in range(settings["stages"])]
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
