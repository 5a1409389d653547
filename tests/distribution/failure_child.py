"""One of several workers that back up at the end of every epoch.

At a step of the settings it stops: `kill` ends it at once, `freeze` leaves it there
without an answer. Prints the seconds that a failed step took, or its final weights.
"""

import json
import os
import signal
import sys
import time

import keras
import numpy as np
import tensorflow as tf

from tests.distribution import child

EPOCHS, STEPS = 4, 5


class Stop(keras.callbacks.Callback):
    """Stops the process in the middle of an epoch."""

    def __init__(self, how, epoch):
        super().__init__()
        self.how, self.stop_epoch, self.epoch = how, epoch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.stop_epoch and batch == 2:
            print("STOPPING", flush=True)
            number = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}[self.how]
            os.kill(os.getpid(), number)


class Clock(keras.callbacks.Callback):
    """When the last step ended."""

    def on_train_begin(self, logs=None):
        self.last = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        self.last = time.monotonic()


def main():
    settings = json.loads(sys.argv[1])
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    child.start(1)
    options = tf.distribute.experimental.CommunicationOptions(
        timeout_seconds=settings.get("timeout_seconds")
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    case = child.Case(num_experts=7, optimizer="Adam")
    model = child.build(case, strategy)
    backup = keras.callbacks.BackupAndRestore(
        f"{settings['directory']}/worker_{index}", delete_checkpoint=False
    )
    clock = Clock()
    callbacks = [backup, SeedOfEpoch(), clock]
    if settings.get("stop") and index == 1:
        callbacks.append(Stop(settings["stop"], epoch=2))
    try:
        model.fit(
            child.dataset(case).repeat(),
            epochs=EPOCHS,
            steps_per_epoch=STEPS,
            verbose=0,
            shuffle=False,
            callbacks=callbacks,
        )
    except Exception as error:
        seconds = time.monotonic() - clock.last
        print(
            "RESULT " + json.dumps({"error": type(error).__name__, "seconds": seconds})
        )
        sys.stdout.flush()
        os._exit(1)  # the runtime waits for the lost worker at a normal end
    weights = [float(np.sum(np.abs(v.numpy()))) for v in model.trainable_variables]
    print("RESULT " + json.dumps({"weights": weights}), flush=True)


class SeedOfEpoch(keras.callbacks.Callback):
    """The noise of an epoch is the same in a run that goes on."""

    def on_epoch_begin(self, epoch, logs=None):
        for variable in self.model.variables:
            if variable.path.endswith("seed_generator_state"):
                variable.assign([1, 1000 * epoch])


if __name__ == "__main__":
    main()
