"""One stage of a training run that moves between numbers of devices.

Each stage loads what the stage before has written, in every format, trains two steps
and writes again. The stage on one device also trains all steps without a break.
"""

import json
import sys
from pathlib import Path

import keras
import tensorflow as tf

import keras_moe
from tests.distribution import child

STEPS = 2
FORMATS = ("weights", "keras", "checkpoint", "backup")


def build(strategy):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    with child.scope_of(strategy):
        model = keras.Sequential(
            [
                keras.Input((child.TIME,), dtype="int32"),
                keras.layers.Embedding(child.VOCABULARY, child.WIDTH),
                keras_moe.layers.HierarchicalMoE(
                    keras_moe.layers.FeedForwardExperts(12, hidden_units=24),
                    num_groups=4,
                    primary_gating=keras_moe.layers.NoisyTopKGating(k=2, seed=3),
                    name="groups",
                ),
                child.mixture(child.Case(num_experts=7)),
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


def run_format(kind, stage, folder, strategy):
    """Loads, trains and saves; the losses."""
    before, after = folder / f"{kind}_{stage - 1}", folder / f"{kind}_{stage}"
    if kind == "keras" and stage:
        keras.utils.clear_session()
        with child.scope_of(strategy):
            model = keras.saving.load_model(before.with_suffix(".keras"))
    else:
        model = build(strategy)
    if kind == "backup":
        backup = keras.callbacks.BackupAndRestore(
            folder / "backup", delete_checkpoint=False
        )
        return train(model, stage, [backup], epochs=stage + 1)
    with child.scope_of(strategy):
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    if stage and kind == "weights":
        model.load_weights(before.with_suffix(".weights.h5"))
    if stage and kind == "checkpoint":
        checkpoint.read(str(before)).assert_existing_objects_matched()
    losses = train(model, stage)
    if kind == "weights":
        model.save_weights(after.with_suffix(".weights.h5"))
    elif kind == "keras":
        model.save(after.with_suffix(".keras"))
    else:
        checkpoint.write(str(after))
    return losses


def main():
    settings = json.loads(sys.argv[1])
    stage, devices = settings["stage"], settings["devices"]
    child.start(devices)
    strategy = child.strategy_of(devices) if devices > 1 else None
    folder = Path(settings["directory"])
    results = {kind: run_format(kind, stage, folder, strategy) for kind in FORMATS}
    if strategy is None:
        model = build(None)
        results["unbroken"] = [train(model, i) for i in range(settings["stages"])]
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
